"""An emulator of NVIDIA's PTX: it runs what Triton compiled from the kernels, on CPU tensors, with no GPU.

``pytest --ptx=80`` and ``pytest --ptx=90`` run the tests of the kernels on it. Triton's interpreter runs the same
kernels in NumPy, one program after another. The emulator runs the compiled code: its threads, warps and barriers, its
shared memory, its programs at once.

What it shows: that the logic, the addresses and the order of accesses are right, for every order of programs and warps
that it draws. It stops with a :class:`~tests.ptx.core_library.Trap` at

- an access outside of the tensors that are alive, or of shared memory, or one that is not aligned;
- a race between warps of a program, in shared or in global memory, and between programs where nothing orders them;
- a value that nobody has defined, where it decides something: an address, a branch, a store;
- a copy or product under way that is used before it is waited for;
- warps or programs that wait for ever.

Where programs tell each other something, memory is weak: caches grow stale, and stores arrive late and out of order.

What it does not show: the speed; what ptxas makes of the code; the approximations of the hardware. Each result is
rounded correctly, also that of an instruction that only approximates on a GPU, and a matrix product once at the end.

The modules, in the order in which they work:

- ``option``, ``hooks``: the option ``--ptx``, and what a run with it tells at its end;
- ``machine``: a launch of the project on the emulator;
- ``parse``: PTX text as statements;
- ``instructions``: the table of all instructions, and what each does;
- ``program``: statements as numbers, and their run;
- ``core_library``, ``build``: the core, compiled when it is first needed, and its functions;
- ``tensors``: where global memory may be accessed.

The core is in C++, in ``core/``, an area a file: ``scheduler`` gives turns to the ``warp``\\ s of each ``block``; they
run operations on numbers (``integers``, ``bits``, ``floats``, ``comparisons``, ``conversions``, ``moves``), on memory
(``global_memory`` with ``weak_memory``, ``global_races`` and ``program_races``; ``shared_memory``, ``async_copies``),
between lanes (``exchanges``), and on matrices (``matrices``, ``warpgroup``). ``interface`` is what Python calls.

The tests beside it hold every instruction against a closed form; ``snippets`` runs short kernels for them.
"""
