"""What a task is (protocol.py), and the tasks that come with the trainer, one file each."""
