"""Mutants that no test can notice, by name, each with the reason. `mutants.py` tries them nevertheless."""

from __future__ import annotations

# fmt: off
# ruff: noqa: E501
# Why no test can see them -> names of mutants, as --list prints them.
EQUIVALENT: dict[str, tuple[str, ...]] = {
    "choose() sets it before anyone reads it": (
        "checks/audit Audit.__init__: self._leaves = 0  ->  self._leaves = 1",
        "checks/audit Audit.__init__: self._shift = 0  ->  self._shift = 1",
        "checks/audit Audit.__init__: self._step = 0  ->  self._step = 1",
    ),
    "begin() sets it before anyone reads it": (
        "batch_norm RunningStatistics.__init__: self._trained = [False] * len(found)  ->  self._trained = [True] * len(found)",
    ),
    "a spare counter costs an operation, and nobody reads it": (
        "batch_norm RunningStatistics.__init__: isinstance(module, nn.SyncBatchNorm) and counter is not None else None  ->  isinstance(module, nn.SyncBatchNorm) or counter is not None else None",
    ),
    "any negative number says that a layer was not called": (
        "batch_norm : _NOT_CALLED = -3e+38  ->  _NOT_CALLED = -3e+38",
    ),
    "the number stands for a momentum that a cumulative average does not use": (
        "batch_norm RunningStatistics.__init__: momenta = [0.5 if momentum is None else momentum  ->  momenta = [1.5 if momentum is None else momentum",
    ),
    "how large gradients may be before they are exchanged in shards: both ways give the same bits, and the limit is measured": (
        "exchange : DIRECT_LIMIT_BYTES = 6 << 20  ->  DIRECT_LIMIT_BYTES = 7 << 20",
        "exchange : DIRECT_LIMIT_BYTES = 6 << 20  ->  DIRECT_LIMIT_BYTES = 6 << 21",
    ),
    "how many weights are made ahead changes none of them": (
        "checks/hashes _first_weights: length = min(_CHUNK, max(1 << 12, 1 << (count  ->  length = max(_CHUNK, max(1 << 12, 1 << (count",
        "checks/hashes _first_weights: length = min(_CHUNK, max(1 << 12, 1 << (count - 1).bit_length  ->  length = min(_CHUNK, max(1 >> 12, 1 << (count - 1).bit_length",
        "checks/hashes _first_weights: length = min(_CHUNK, max(1 << 12, 1 << (count - 1).bit_length  ->  length = min(_CHUNK, max(2 << 12, 1 << (count - 1).bit_length",
        "checks/hashes _first_weights: length = min(_CHUNK, max(1 << 12, 1 << (count - 1).bit_length  ->  length = min(_CHUNK, max(1 << 13, 1 << (count - 1).bit_length",
        "checks/hashes _first_weights: length = min(_CHUNK, max(1 << 12, 1 << (count - 1).bit_length()  ->  length = min(_CHUNK, max(1 << 12, 2 << (count - 1).bit_length()",
        "checks/hashes _first_weights: _CHUNK, max(1 << 12, 1 << (count - 1).bit_length()))  ->  _CHUNK, max(1 << 12, 1 << (count + 1).bit_length()))",
        "checks/hashes _first_weights: mixed(torch.arange(1, length + 1, device=device)) | 1  ->  mixed(torch.arange(1, length + 2, device=device)) | 1",
        "checks/hashes _first_weights: weights is None or len(weights) < count:  ->  weights is None or len(weights) <= count:",
    ),
    "both give one round for a tensor of at most one word": (
        "checks/hashes hash64: for start in range(0, max(1, len(words)), _CHUNK):  ->  for start in range(0, max(2, len(words)), _CHUNK):",
    ),
    "how many micro-batches are gathered at once changes no bit: it bounds the memory": (
        "micro_batches : CHUNK_BYTES = 64 << 20  ->  CHUNK_BYTES = 64 >> 20",
        "micro_batches : CHUNK_BYTES = 64 << 20  ->  CHUNK_BYTES = 65 << 20",
        "micro_batches : CHUNK_BYTES = 64 << 20  ->  CHUNK_BYTES = 64 << 21",
        "micro_batches MicroBatches.__init__: = max(1, CHUNK_BYTES // max(1, sample_bytes * micro_batch_size  ->  = max(1, CHUNK_BYTES // max(2, sample_bytes * micro_batch_size",
    ),
    "numbers from a table and numbers drawn directly are the same: the limit bounds the memory": (
        "order SampleRandom: table_limit: int = 1 << 20  ->  table_limit: int = 1 >> 20",
        "order SampleRandom: table_limit: int = 1 << 20  ->  table_limit: int = 2 << 20",
        "order SampleRandom: table_limit: int = 1 << 20  ->  table_limit: int = 1 << 21",
        "order SampleRandom._draw: few = self.samples * columns <= self.table_limit  ->  few = self.samples * columns < self.table_limit",
        "order SampleRandom._draw: few = self.samples * columns <= self.table_limit  ->  few = self.samples // columns <= self.table_limit",
    ),
    "of() sets it before anyone reads it": (
        "order SampleRandom: _stream: int = 0  ->  _stream: int = 1",
    ),
    "begin() has kept a state exactly where the task draws": (
        "checks/foreign_draws ForeignDraws.end: if not self._draws or self._state is None:  ->  if not self._draws and self._state is None:",
    ),
    "only the last bucket has two segments; the first begins at float 0, and nothing is placed after the second": (
        "optional/early_exchange EarlyExchange._fill: place += stop - start  ->  place += stop + start",
        "optional/early_exchange EarlyExchange._put: place += stop - start  ->  place += stop + start",
    ),
    "any tags will do that differ from one another and from 0": (
        "optional/early_exchange EarlyExchange._begin_gather: begin_gather(gathered, piece, tag=1 + message.number))  ->  begin_gather(gathered, piece, tag=2 + message.number))",
    ),
    "a sum is finite where a difference is, up to an overflow": (
        "step ExactStep.__call__: health = records.losses.sum() + norm  ->  health = records.losses.sum() - norm",
    ),
    "every place is set before it is read": (
        "order by_length: starts = [0] * len(bounds)  ->  starts = [1] * len(bounds)",
    ),
    "of a bucket with two segments the first begins at 0": (
        "optional/early_exchange EarlyExchange._put: place += stop - start  ->  place += stop + start",
        "optional/early_exchange EarlyExchange._fill: place += stop - start  ->  place += stop + start",
    ),
    "any tags do that differ from bucket to bucket and are the same on all ranks": (
        "optional/early_exchange EarlyExchange._begin_gather: begin_gather(gathered, piece, tag=1 + message.number))  ->  begin_gather(gathered, piece, tag=2 + message.number))",
    ),
    "a slice of the indices and their joined pieces are the same": (
        "micro_batches MicroBatches._gathered: 1] - chunk[0] == len(chunk) - 1:  ->  1] - chunk[0] == len(chunk) + 1:",
    ),
    "Choice.begin() sets it before anyone reads it": (
        "packs/choice Choice.__init__: self._now, self._work = (1, 1.0)  ->  self._now, self._work = (2, 1.0)",
        "packs/choice Choice.__init__: self._now, self._work = (1, 1.0)  ->  self._now, self._work = (1, 2.0)",
    ),
    "times are only compared with one another: their unit does not matter": (
        "packs/choice Choice._collect: = began.elapsed_time(ended) / 1000.0  ->  = began.elapsed_time(ended) * 1000.0",
        "packs/choice Choice._collect: began.elapsed_time(ended) / 1000.0  ->  began.elapsed_time(ended) / 1001.0",
    ),
    "any negative number says that there is no rule": (
        "packs/findings : ALONE = -1  ->  ALONE = -2",
    ),
    "names are only compared with one another: each differs from the same others": (
        "packs/form Form.__init__: self.value = 0  ->  self.value = 1",
        "packs/form Form._look_at: numbers else (type(value), value == self._rows))  ->  numbers else (type(value), value != self._rows))",
    ),
    "-1 and -2 still have two hashes, whichever of them a fraction stands for": (
        "packs/form _name_of: return -1.5 if value == -1 else value  ->  return -1.5 if value == -2 else value",
        "packs/form _name_of: return -1.5 if value == -1 else value  ->  return -2.5 if value == -1 else value",
    ),
    "torch's function has this argument, and a pack does not use it": (
        "packs/functions _call_dropout: training: bool=True, inplace: bool=False) -> Any:  ->  training: bool=True, inplace: bool=True) -> Any:",
    ),
    "torch has no such call with more arguments": (
        "packs/independent _is_turned: dims = args[1:3]  ->  dims = args[1:4]",
    ),
    "query and key have the same number of dimensions, and as many samples": (
        "packs/independent _is_attention: parted(t) and t.dim() == args[0].dim() >= 3 for t in args[:3  ->  parted(t) and t.dim() == args[1].dim() >= 3 for t in args[:3",
        "packs/independent _is_attention: == 1 and _are_aligned((args[0], *_tensors((args[3:], kwargs  ->  == 1 and _are_aligned((args[1], *_tensors((args[3:], kwargs",
    ),
    "how many arguments there are matters to tables only, which are not set": (
        "packs/independent _is_set: 0]) or not _is_indexed(args[:2], {}, parted):  ->  0]) or not _is_indexed(args[:3], {}, parted):",
    ),
    "the second argument is a shape, and has no tensors": (
        "packs/independent _is_normalised: others = _tensors((args[1:], kwargs))  ->  others = _tensors((args[2:], kwargs))",
    ),
    "any negative number says that the classes are not given": (
        "packs/independent _is_one_hot: args[1] if len(args) > 1 else -1)  ->  args[1] if len(args) > 1 else -2)",
    ),
    "only a BatchNorm has statistics to put somewhere, and its call is always told where": (
        "packs/layer_functions _linear.call: b: Tensor | None, place: int=0) -> Tensor:  ->  b: Tensor | None, place: int=1) -> Tensor:",
        "packs/layer_functions _addmm.call: Tensor, b: Tensor, place: int=0) -> Tensor:  ->  Tensor, b: Tensor, place: int=1) -> Tensor:",
        "packs/layer_functions _convolution.both.call: b: Tensor | None, place: int=0) -> Tensor:  ->  b: Tensor | None, place: int=1) -> Tensor:",
        "packs/layer_functions _embedding.call: Tensor, b: None, place: int=0) -> Tensor:  ->  Tensor, b: None, place: int=1) -> Tensor:",
        "packs/layer_functions _layer_norm.call: b: Tensor | None, place: int=0) -> Tensor:  ->  b: Tensor | None, place: int=1) -> Tensor:",
        "packs/layer_functions _rms_norm.call: Tensor, b: None, place: int=0) -> Tensor:  ->  Tensor, b: None, place: int=1) -> Tensor:",
        "packs/layer_functions _group_norm.call: b: Tensor | None, place: int=0) -> Tensor:  ->  b: Tensor | None, place: int=1) -> Tensor:",
        "packs/layer_functions _broadcast.rule.call: Tensor, b: None, place: int=0) -> Tensor:  ->  Tensor, b: None, place: int=1) -> Tensor:",
        "packs/layer_functions _batch_norm.call: b: Tensor | None, place: int=0) -> Tensor:  ->  b: Tensor | None, place: int=1) -> Tensor:",
    ),
    "the norm matters with max_norm only, which has no rule": (
        "packs/layer_functions _embedding: None=None, norm_type: float=2.0, scale_grad_by_freq: bool  ->  None=None, norm_type: float=3.0, scale_grad_by_freq: bool",
    ),
    "a number is neither samples nor a parameter, so the next condition leaves it to others": (
        "packs/layer_functions _broadcast.rule: kwargs or len(args) != 2 or (not all((isinstance(a, Tensor) for a  ->  kwargs or len(args) != 2 or (not any((isinstance(a, Tensor) for a",
    ),
    "the kind is compared, and never added up as bits": (
        "packs/tensors : PARTED, NUMBERS, SAME = (1, 2, 4)  ->  PARTED, NUMBERS, SAME = (1, 2, 5)",
    ),
    "the number only tells tensors apart": (
        "packs/tensors Tensors.__init__: self._count = 0  ->  self._count = 1",
        "packs/tensors Tensors.mark: self._count += 1  ->  self._count += 2",
    ),
    "every call that is noted says so itself": (
        "packs/trace Call: changes: bool = False  ->  changes: bool = True",
        "packs/trace Call: aliases: bool = False  ->  aliases: bool = True",
    ),
    "torch's mode has nothing to set up": (
        "packs/trace Trace.__init__: super().__init__()  ->  None",
    ),
    "a gradient has no more dimensions than these": (
        "packs/layers Site._differs_for: sign, *[sign] * (like.dim() - 1)], self.g)  ->  sign, *[sign] * (like.dim() + 1)], self.g)",
    ),
    "all pieces have one shape": (
        "packs/layers joined: size in zip(strides, pieces[0].shape))):  ->  size in zip(strides, pieces[1].shape))):",
    ),
    "how many gradients are added at once changes no bit: it bounds the memory": (
        "packs/pack_sum : FLUSH_BYTES = 4 << 20  ->  FLUSH_BYTES = 4 >> 20",
        "packs/pack_sum : FLUSH_BYTES = 4 << 20  ->  FLUSH_BYTES = 5 << 20",
        "packs/pack_sum : FLUSH_BYTES = 4 << 20  ->  FLUSH_BYTES = 4 << 21",
    ),
    "norms beyond those of the last parameter are left out": (
        "packs/pack_sum PackSum._flush: number * self._count:(number + 1) * self._count])  ->  number * self._count:(number + 2) * self._count])",
    ),
    "a sender sends what is complete, and nothing else": (
        "packs/pack_sum PackSum.take: if complete and self._last is not None:  ->  if complete or self._last is not None:",
    ),
    "channels and places lie one after the other, and the reshape brings them into this form": (
        "packs/rules _apart: y.view(len(y), g, -1, *y.shape[2:]).transpose(0, 1).reshape(g  ->  y.view(len(y), g, -1, *y.shape[3:]).transpose(0, 1).reshape(g",
    ),
    "any negative number is no row": (
        "packs/rules _embedding_backward: grad.shape[-1]), rows, g * V, -1, o['scale_grad_by_freq']).view  ->  grad.shape[-1]), rows, g * V, -2, o['scale_grad_by_freq']).view",
    ),
    "all samples have as many places": (
        "packs/rules _group_norm_forward: torch.ops.aten.native_group_norm(x, weight, bias, N, C, x[0, 0].numel(), o['groups'], o  ->  torch.ops.aten.native_group_norm(x, weight, bias, N, C, x[1, 0].numel(), o['groups'], o",
        "packs/rules _group_norm_backward: torch.ops.aten.native_group_norm_backward, site.g, (x.size(1), x[0, 0].numel()))  ->  torch.ops.aten.native_group_norm_backward, site.g, (x.size(1), x[1, 0].numel()))",
    ),
    "of a bias a convolution's backward looks only at whether there is one": (
        "packs/rules _grouped_backward: None if bias is None else [g * bias.numel()]  ->  None if bias is None else [g // bias.numel()]",
    ),
    "a view gives the sums their shape": (
        "packs/rules _summed_to: return by.sum(dims, keepdim=True) if dims else by  ->  return by.sum(dims, keepdim=False) if dims else by",
    ),
    "all micro-batches use the same parameters": (
        "packs/shares Shares._alias: if k == 0:  ->  if k == 1:",
    ),
    "all pieces come from one node of the graph": (
        "packs/shares Shares._piece: self.ends[pieces[0].grad_fn] = self._tensors.named  ->  self.ends[pieces[1].grad_fn] = self._tensors.named",
    ),
    "there are more places than arguments": (
        "packs/shares Shares.part: range(len(flat(value, [])) + 1))  ->  range(len(flat(value, [])) + 2))",
    ),
    "any other number than ALONE says that the rule holds": (
        "packs/sites Sites.holds: weight, bias, like=grad) else 0  ->  weight, bias, like=grad) else 1",
    ),
    "a trial chooses before anyone looks": (
        "packs/sites Sites.layer: self._findings.sites.get(key, len(rules) - 1 if self._checks else ALONE  ->  self._findings.sites.get(key, len(rules) + 1 if self._checks else ALONE",
    ),
    "with a GPU both are there, and without one neither is": (
        "packs/streams Streams.of: if self._gpu is not None and gpu is not None:  ->  if self._gpu is not None or gpu is not None:",
        "packs/streams Streams._rest: if self._gpu is not None and self._resting_gpu is not None  ->  if self._gpu is not None or self._resting_gpu is not None",
    ),
    "what is drawn from the state at rest is refused, whatever it is": (
        "packs/streams Streams.begin: self._host.manual_seed(0)  ->  None",
        "packs/streams Streams.begin: self._host.manual_seed(0)  ->  self._host.manual_seed(1)",
        "packs/streams Streams.begin: self._resting_gpu.manual_seed(0)  ->  self._resting_gpu.manual_seed(1)",
        "packs/streams Streams.aside: self._resting_gpu.manual_seed(0)  ->  self._resting_gpu.manual_seed(1)",
    ),
    "begin_alone() sets it before anyone reads it": (
        "packs/trial Trial.__init__: self._next = 0  ->  self._next = 1",
    ),
    "memory that nobody looks at": (
        "packs/values _laid_out_like: span = 1 + sum(((size - 1) * stride for  ->  span = 2 + sum(((size - 1) * stride for",
        "packs/values _laid_out_like: span = 1 + sum(((size - 1) * stride for size, stride  ->  span = 1 + sum(((size + 1) * stride for size, stride",
    ),
    "of an even number of places none is left over, and what is left over of an odd one becomes 0": (
        "packs/values _pairs: factors[order[half:2 * half]] = float(sign)  ->  factors[order[half:3 * half]] = float(sign)",
        "packs/values _pairs: if length > 1:  ->  if length > 2:",
    ),
    "every pack and every trial sets it": (
        "packs/verdicts Packed: form: int = 0  ->  form: int = 1",
        "packs/verdicts Verdict: random: bool = True  ->  random: bool = False",
    ),
    "any negative number is no step": (
        "packs/verdicts Verdict: step: int = -1  ->  step: int = -2",
    ),
    "a longer search finds nothing more": (
        "plan nearest_possible: largest = -(-B // m) if B is not None and m is  ->  largest = -(-B * m) if B is not None and m is",
        "plan nearest_possible: range(max(world_size, largest) + 1):  ->  range(max(world_size, largest) + 2):",
    ),
    "torch's own does nothing": (
        "packs/pack Pack.__init__: super().__init__()  ->  None",
    ),
    "all micro-batches make the same graph": (
        "packs/pack Pack.apart: if k == 0 and self._trial is not None  ->  if k != 0 and self._trial is not None",
        "packs/pack Pack.apart: if k == 0 and self._trial is not None  ->  if k == 1 and self._trial is not None",
        "packs/pack Pack._apart_forward.call: if k == 0 and trial is not None:  ->  if k != 0 and trial is not None:",
        "packs/pack Pack._apart_forward.call: if k == 0 and trial is not None:  ->  if k == 1 and trial is not None:",
    ),
    "nobody reads it of a module": (
        "packs/pack Pack._apart_forward.call: self._findings.calls[self.form] = Way(False, scaled, ())  ->  self._findings.calls[self.form] = Way(True, scaled, ())",
    ),
    "it matters only while torch traces a function": (
        "packs/pack Pack._note: torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  ->  torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:",
    ),
    "a call of a micro-batch alone is known in trials only": (
        "packs/pack Pack._seen: if self._trial is not None and own is not None:  ->  if self._trial is not None or own is not None:",
    ),
    "what is called without a word about it draws nothing": (
        "packs/pack Pack.apart: dict[str, Any], random: bool=False, scaled: frozenset[int]=frozenset  ->  dict[str, Any], random: bool=True, scaled: frozenset[int]=frozenset",
    ),
    "one use beside the call's own is as good as several": (
        "packs/pack Pack.outputs_of: if k == 0 and self._trial is not None  ->  if k != 0 and self._trial is not None",
        "packs/pack Pack.outputs_of: if k == 0 and self._trial is not None  ->  if k == 1 and self._trial is not None",
    ),
    "all micro-batches give values of one type, and the same": (
        "packs/pack Pack.read:  list)) and value == values[0] for value in values)):  ->   list)) and value == values[1] for value in values)):",
        "packs/pack Pack.read: once = all((isinstance(value, (bool, int  ->  once = any((isinstance(value, (bool, int",
        "packs/pack Pack.read: return values[0]  ->  return values[1]",
    ),
    "of a parameter's modules only the first is read": (
        "packs/packs Packs.__init__: model.named_modules(remove_duplicate=False):  ->  model.named_modules(remove_duplicate=True):",
    ),
    "begin() sets it before end() reads it": (
        "packs/packs Packs.__init__: self._tried = False  ->  self._tried = True",
    ),
    "where the last two differ, the trial refuses in any case": (
        "packs/packs Packs._compare: same_calls(traces[0], traces[-1])):  ->  same_calls(traces[0], traces[-2])):",
    ),
    "all micro-batches of a pack have one shape": (
        "packs/packs Packs._key: part), *shape_of(batch, part[0]))  ->  part), *shape_of(batch, part[1]))",
        "packs/packs Packs.compute_samples: rows = g * shape_of(batch, part[0])[0]  ->  rows = g * shape_of(batch, part[1])[0]",
    ),
}

# What of a GPU they need -> names. These count as survived.
NEEDS_A_GPU: dict[str, tuple[str, ...]] = {
    "a copy that nobody waits for": (
        "flags Flags.read:  torch.empty((), pin_memory=True).copy_(flags.max(), non_blocking  ->   torch.empty((), pin_memory=False).copy_(flags.max(), non_blocking",
        "flags Flags.read: .copy_(flags.max(), non_blocking=True)  ->  .copy_(flags.max(), non_blocking=False)",
    ),
    "streams, and memory of graphs": (
        "optional/early_exchange EarlyExchange.__call__: torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)  ->  None",
        "optional/graphs Graphs._try_out: self._pool = self._pool or torch.cuda.graph_pool_handle  ->  self._pool = self._pool and torch.cuda.graph_pool_handle",
    ),
    "the alignment of its memory": (
        "micro_batches : ALIGNMENT_BYTES = {'cpu': 64, 'cuda': 512}  ->  ALIGNMENT_BYTES = {'cpu': 64, 'cuda': 513}",
    ),
}
# fmt: on
