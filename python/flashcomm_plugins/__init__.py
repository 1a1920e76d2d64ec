"""Plugins that hand the large all-reduces of vLLM and SGLang to libflashcomm.so.

The engines find them by the wheel's entry points and call `load` in every process. Without
FLASHCOMM_PLUGIN=1 that does nothing. With it the engine's own communicator opens the shim, and
all-reduces are routed by size: from where the shim compresses on they are its own, below they
stay where the engine puts them, so its kernels for small sums are left on.

vllm.py and sglang.py are the plugins, routing.py decides, shim.py asks the library, and asked.py
holds the switch and what is said.
"""
