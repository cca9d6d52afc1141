#!/usr/bin/env bash
# What tests/test_machines.py needs of Debian or Ubuntu, as root: sshd, ssh and pdsh, and `ip` for network namespaces.
# No service is started: the tests start an sshd of their own in each namespace.
set -euo pipefail

missing=()
command -v sshd > /dev/null || [ -x /usr/sbin/sshd ] || missing+=(openssh-server)
command -v ssh > /dev/null || missing+=(openssh-client)
command -v pdsh > /dev/null || missing+=(pdsh)
command -v ip > /dev/null || missing+=(iproute2)
if [ "${#missing[@]}" = 0 ]; then exit 0; fi
if [ "$(id -u)" != 0 ]; then
    echo "error: ${missing[*]} must be installed, which takes root" >&2
    exit 1
fi

# Without this, installing openssh-server would start it on all of this machine's addresses.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" > /dev/null
