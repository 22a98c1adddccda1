"""DeepSpeed: processes, devices, ZeRO engines, and the full (unsharded) state behind them.

The only file that imports deepspeed. The same code runs on CPUs (gloo), on one GPU and on many (nccl); the state it
hands out and takes back is by parameter name and unsharded, so a checkpoint does not depend on the number of processes,
the ZeRO stage or the precision it was written under.
"""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kernels.compile.modes import compile_module
from kernels.registry import Ops
from launch.runtime import heartbeat, launcher
from launch.runtime.processes import Processes, local_gpu, rendezvous
from launch.runtime.read_ahead import end_processes
from launch.training.block_norms import BlockNorms, Part
from launch.training.optimizer import MASTER, STATE_KEYS, AdamWEma

if launcher.accelerator(gpus_here=torch.cuda.is_available()) == "cpu":
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed probes for accelerators and warns

import deepspeed
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import logger as deepspeed_logger

ZERO_SUPPORTED_OPTIMIZERS.append(AdamWEma)  # it works element by element, on any partition

State = dict[str, dict[str, torch.Tensor]]


def uses_cuda() -> bool:
    """Whether to train on GPUs: where there are any, unless DS_ACCELERATOR=cpu says otherwise."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def start_processes(timeout_minutes: int = 30, heartbeat_timeout: float = heartbeat.TIMEOUT) -> Processes:
    """Join the process group the launcher describes (RANK, WORLD_SIZE, LOCAL_RANK …), or be a group of one.

    The device is the GPU of LOCAL_RANK where there is one, else the CPU. Calling it again joins nothing twice. From
    then on all processes leave where one is lost, also one that has not answered for `heartbeat_timeout` seconds.

    Raises LaunchError where the environment makes no sense, or the processes do not meet.
    """
    environment = launcher.launch_environment()
    deepspeed_logger.setLevel(logging.WARNING)
    # float32 products are IEEE, and a run repeats bit for bit; cuDNN's defaults promise neither.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    cuda = uses_cuda()
    device = torch.device("cuda", local_gpu(environment)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend, timeout = ("nccl" if cuda else "gloo"), timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        if environment is not None:
            store = rendezvous(environment)
            heartbeat.start(environment, store, heartbeat_timeout, _end_children)
            dist.init_process_group(
                backend, store=store, rank=environment.rank, world_size=environment.world_size, timeout=timeout
            )
        else:
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists on it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        if not cuda:  # there DeepSpeed has no such op, and would run compilers to find out which others it could build
            # A C++ extension for inference only, which it would compile (a minute) before the first training step.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, verbose=False)
    world_size = dist.get_world_size()
    host_group = dist.new_group(backend="gloo", timeout=timeout) if cuda and world_size > 1 else None
    return Processes(dist.get_rank(), world_size, device, host_group)


def stop_processes() -> None:
    """Leave the process group, if there is one; at the end of a process, as DeepSpeed keeps hold of its groups."""
    heartbeat.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_children() -> None:
    end_processes(multiprocessing.active_children())


def compile_mode(asked: str, stage: int, accumulation: int = 1) -> str:
    """The mode that `train.compile` means on this machine under a ZeRO stage; never "auto".

    Raises ValueError for CUDA graphs where gradients would wait in a graph's memory for those of the next micro-batch
    (`accumulation` of them make a step), whose replay overwrites them. ZeRO 2 and 3 take each away at once.
    """
    if asked == "cudagraphs" and accumulation > 1 and stage < 2:
        raise ValueError(
            f"train.compile is cudagraphs, but train.micro_batch_size cuts a step into {accumulation} "
            f"parts and deepspeed.zero_stage {stage} leaves gradients where the next part's are written: "
            "use zero_stage 2, compile inductor, or a step in one part"
        )
    if asked != "auto":
        return asked
    return "inductor" if uses_cuda() and stage < 3 else "none"


class Engine:
    """One network under DeepSpeed, with its AdamW and moving average.

    Args:
        module: the network, float32, with the weights to start from already in it.
        make_optimizer: from the trainable parameters and whether processes hold parts of the gradients, the optimizer.
        config: as made by `launch.training.deepspeed_options.deepspeed_config`.
        compile, ops, deterministic: as `kernels.compile.modes.compile_module` takes them.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: Callable[..., AdamWEma],
        config: dict,
        compile: str = "none",
        ops: Ops | None = None,
        deterministic: bool = True,
    ):
        self.module = module
        self._names = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._buffers = [name for name in module.state_dict() if name in dict(module.named_buffers())]
        self._stage = config["zero_optimization"]["stage"]
        self._frozen = {name: p.detach().cpu().clone() for name, p in module.named_parameters() if not p.requires_grad}
        # DeepSpeed casts the module before the optimizer copies its master weights: keep what they should be.
        bf16 = config["bf16"]["enabled"]
        self._optimizer_has_masters = config["bf16"].get("bf16_master_weights_and_grads", False)
        masters = {name: p.detach().clone() for name, p in self._names.items()} if bf16 else {}
        device = torch.device("cuda" if uses_cuda() else "cpu")
        module.to(device)
        self.optimizer: AdamWEma = make_optimizer(list(self._names.values()), partitioned=self._stage > 0)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        if self._stage < 3:  # ZeRO 3 shards them, rounded
            for name, value in self._frozen.items():
                module.get_parameter(name).data = value.to(device)
        self._running_buffers = [(buffer, buffer.clone()) for buffer in _running_statistics(module)]
        compile_module(module, compile, ops, deterministic)
        self._init_optimizer_states()
        #: The end of a copy of the state that a stream of its own makes; nothing here changes the state before it.
        self.copied: torch.cuda.Event | None = None
        self.optimizer.register_step_pre_hook(lambda *_: self._await_copy())
        parts = {name: self._parts(p, index) for index, (name, p) in enumerate(self._names.items())}
        self.optimizer.blocks = BlockNorms(parts, self._stage > 0)
        for name, value in masters.items():
            self._write(name, "model", value)
            self._write(name, "ema", value)

    def __call__(self, *args, **kwargs):
        return self._engine(*args, **kwargs)

    def train(self, mode: bool = True) -> "Engine":
        self._engine.train(mode)
        return self

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of this micro-batch; a non-finite loss marks the whole step to be skipped."""
        self.optimizer.check_loss(loss.detach())
        self._engine.backward(loss)

    def step(self) -> None:
        """End a micro-batch: at the last one of a step, reduce gradients and update weights and average."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if boundary and getattr(self._engine.optimizer, "overflow", False):
            self.optimizer.count_skipped()  # ZeRO 3, and ZeRO 0 in bf16, skip on their own and never call the optimizer

    def restore_statistics(self, skipped: torch.Tensor) -> None:
        """End a step of all networks: where it was skipped (a bool on the device), take back running statistics.

        A skipped step's forward passes have moved them by then, to NaN for ever.
        """
        for buffer, kept in self._running_buffers:
            buffer.copy_(torch.where(skipped, kept, buffer))
            kept.copy_(buffer)

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the parameters, which would keep weights and optimizer alive."""
        self._engine.destroy()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Compute with the moving average until the block ends, then with the weights of before, bit for bit.

        Every process must enter and leave it. In it nothing may be trained or saved: where no other copy is kept (ZeRO
        0 in float32), the weights in use are the master weights. It takes a second copy of the weights in use.
        """
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._await_copy()
        self._release_gathered()
        try:
            for name in self._names:
                average = self._read(name, "ema")
                for target, value in self._in_use(self._names[name], average):
                    kept.append((target, target.clone()))
                    target.copy_(value)
            yield
        finally:
            self._release_gathered()
            for target, value in reversed(kept):  # under ZeRO 3 two of them may be one memory
                target.copy_(value)

    def _release_gathered(self) -> None:
        """Let ZeRO 3 gather weights anew from their parts, where it still holds what it gathered before."""
        if self._stage == 3:
            self._engine.empty_partition_cache()

    def _in_use(self, p: Any, value: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The tensors that forward passes take a parameter from, each with what it holds for a whole `value`."""
        if self._stage < 3:
            return [(p.data, value)]
        targets = [(p.ds_tensor.data, self._zero3_partition(p, value))]
        if p.ds_status.name == "AVAILABLE":  # small ones stay gathered
            targets.append((p.data, value))
        return targets

    def full_state(self, keys: Iterable[str] = ("model", *STATE_KEYS), *, keep: bool) -> State:
        """Unsharded float32 CPU tensors by parameter name: `model` (with buffers and frozen parameters) and states.

        Every process must call it; those with `keep` false take part in the gathering and get empty dictionaries.
        """
        state: State = {key: {} for key in keys}
        for name in self._names:
            for key in state:
                value = self._read(name, key)
                if keep:
                    state[key][name] = value.to("cpu", torch.float32, copy=True).contiguous()
        if keep and "model" in state:
            state["model"].update(self.untrained_state())
        return state

    def untrained_state(self) -> dict[str, torch.Tensor]:
        """Frozen parameters and buffers, on the CPU and not those in use; numbers that are not whole in float32."""
        tensors = dict(self._frozen)
        for name in self._buffers:
            value = self.module.get_buffer(name).detach().to("cpu", copy=True).contiguous()
            tensors[name] = value.float() if value.is_floating_point() else value
        return tensors

    def shapes(self) -> dict[str, torch.Size]:
        """Of the trained parameters, whole, in the order of `full_state`."""
        return {name: getattr(p, "ds_shape", p.shape) for name, p in self._names.items()}  # ZeRO 3 leaves none in p

    def own_parts(self, key: str) -> Iterator[tuple[str, int, torch.Tensor]]:
        """What this process holds of `model` (the master weights) or a state: of all processes, every element once.

        Yields a parameter's name, the place of the first element in it when it is flat, and the elements as they are in
        use, of any device and strides; names in the order of `full_state`. Nothing is gathered.
        """
        for name in self._names:
            start, value = self._own_part(name, key)
            if value is not None:
                yield name, start, value

    def _own_part(self, name: str, key: str) -> tuple[int, torch.Tensor | None]:
        p: Any = self._names[name]
        if self._stage == 0:
            return 0, self._read(name, key) if dist.get_rank() == 0 else None
        state = None if key == "model" and not self._optimizer_has_masters else MASTER if key == "model" else key
        if self._stage < 3:
            mapping = p._hp_mapping  # None where another process has all of it
            return (mapping.lp_fragment_address.start, mapping.get_hp_fragment(state)) if mapping else (0, None)
        get = deepspeed.utils.safe_get_local_optimizer_state
        part = deepspeed.utils.safe_get_local_fp32_param(p) if state is None else get(p, state)
        start = part.numel() * dist.get_rank()
        size = min(part.numel(), p.ds_numel - start)  # the rest is padding
        return start, part[:size] if size > 0 else None

    def load_states(self, state: State) -> None:
        """Set master weights and optimizer states from unsharded tensors as `full_state` gives them."""
        self._await_copy()
        for name in self._names:
            for key, values in state.items():
                self._write(name, key, values[name])

    def _await_copy(self) -> None:
        """Have the device wait, not the host, until `copied`."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None

    def _init_optimizer_states(self) -> None:
        """Create the optimizer's states and let DeepSpeed's per-parameter views find them."""
        inner = self._engine.optimizer
        self.optimizer.init_states(getattr(inner, "fp32_partitioned_groups_flat", ()))
        link = getattr(inner, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _parts(self, p: Any, index: int) -> list[Part]:
        """Where this process's part of a parameter's gradient lies in the tensors of the optimizer."""
        wrapper = self._engine.optimizer
        if self._stage == 0:
            return [(index, 0, p.numel())]
        if self._stage == 3:
            tensor, start, size = wrapper.grad_position[wrapper.get_param_id(p)]
            return [(tensor, start, size)]
        place = p._hp_mapping
        if place is None:  # all of it lies on other processes
            return []
        address = place.get_hp_fragment_address()
        return [(place.param_group_index, address.start, address.numel)]

    def _unsharded(self, name: str) -> torch.Tensor | None:
        """The master tensor of a parameter where every process holds all of it (ZeRO 0), else None."""
        if self._stage > 0:
            return None
        wrapper = self._engine.optimizer
        if wrapper is self.optimizer:
            return self._names[name]
        index = list(self._names).index(name)
        return wrapper.fp32_groups[0][index]

    def _read(self, name: str, key: str) -> torch.Tensor:
        p, master = self._names[name], self._unsharded(name)
        if master is not None:
            return master.detach() if key == "model" else self.optimizer.state[master][key]
        if key == "model" and not self._optimizer_has_masters:
            return deepspeed.utils.safe_get_full_fp32_param(p)
        return deepspeed.utils.safe_get_full_optimizer_state(p, MASTER if key == "model" else key)

    @torch.no_grad()
    def _write(self, name: str, key: str, value: torch.Tensor) -> None:
        p, master = self._names[name], self._unsharded(name)
        if master is not None:
            target = master.data if key == "model" else self.optimizer.state[master][key]
            target.copy_(value)
        elif self._stage == 3:
            part = self._zero3_partition(p, value)
            if key == "model":
                deepspeed.utils.safe_set_local_fp32_param(p, part)
            else:
                deepspeed.utils.safe_set_local_optimizer_state(p, part, key)
        elif key == "model":
            deepspeed.utils.safe_set_full_fp32_param(p, value.to(p.device))
            if self._optimizer_has_masters:
                deepspeed.utils.safe_set_full_optimizer_state(p, value.to(p.device), MASTER)
        else:
            deepspeed.utils.safe_set_full_optimizer_state(p, value.to(p.device), key)

    @staticmethod
    def _zero3_partition(p: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor under ZeRO 3, padded where the size is no multiple of the processes."""
        size, rank = p.ds_tensor.numel(), dist.get_rank()
        flat = value.flatten()
        padded = torch.nn.functional.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
        return padded[size * rank : size * (rank + 1)].to(p.device)


def _running_statistics(module: nn.Module) -> list[torch.Tensor]:
    """The buffers that forward passes in training mode change, such as BatchNorm's."""
    holders = [part for part in module.modules() if getattr(part, "track_running_stats", False)]
    return [buffer for part in holders for buffer in part.buffers(recurse=False)]
