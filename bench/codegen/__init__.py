"""Compile every shipped kernel configuration, without a GPU, and read what the machine code says.

    python -m bench codegen [--target sm_90] [--family lora] [--kernel grad_a] [--quick] [--json PATH]

Fails on any spill, on more shared (or tensor) memory than a block may use, on a compiler error, on a row of
the configuration tables that no case reaches; and in 16 bits on a matrix kernel without tensor-core
instructions, on a GEMM without wgmma on sm_90 or tcgen05 on sm_100, and on a main loop that takes less than
half of its bytes in 16-byte loads where rows are aligned to that. fp32 kernels keep fp32's products
(`input_precision="ieee"`), which NVIDIA's tensor cores lack.

Each row of the table ends with two instruction mixes, of the whole kernel and of its main loop:
`133:4tc 12+0ld 0sh` is 133 instructions, 4 of them on tensor cores, 12 loads from global memory of 16 bytes
(or a tile by TMA) and none narrower, none from shared memory into registers.

What is compiled is what would run: the package's own launchers are called on meta tensors for each case of
each kernel family (`families/`, whose docstring says how to add one), with the target's table selected and
the kernels replaced by recorders (`recording.py`), and each recorded launch is specialised as Triton's JIT
does (`specialised.py`: strides equal to 1, integers and pointers divisible by 16, pointers within 2 GiB on
AMD). Equal launches are compiled once (`machine_code.py`), and those that a heavier one covers, with a wider
tile of the rank or one branch more, not at all (`--every` compiles them too). `--quick` keeps each family's
default cases: every kernel on every target.
"""
