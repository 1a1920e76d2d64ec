#!/usr/bin/env python3
"""Makes a copy of libnccl.so.2 that carries GPU code for one architecture only.

usage: trim_nccl.py LIBNCCL OUTPUT ARCH        ARCH as in sm_ARCH: 80, 90, 100, ...

A real NCCL holds some 300 MB of code for a dozen architectures. GPU tests that must carry it to a machine without a
network want that of one. The copy has the same size and layout, so nothing in it needs relocating; the bytes of all other
architectures are zeros, which any compressor removes (`xz -1` leaves about 28 MB). It works on GPUs of ARCH alone.

Where the code is. A CUDA library keeps its fat binaries in the ELF section .nv_fatbin, one after another, each
    u32 magic 0xBA55ED50, u16 version 1, u16 header size 16, u64 size of the entries that follow
and each entry, of which there is one per architecture and kind,
    u16 kind (1 PTX, 2 ELF), u16, u32 header size, u64 payload size, u32 ..., u32 architecture at byte 28, ...
The section __nv_relfatbin holds the same functions again, for linkers, and is never loaded by the driver.
"""

import pathlib
import struct
import sys

CONTAINER = struct.Struct("<IHHQ")  # magic, version, header size, size of the entries
MAGIC, VERSION, HEADER_SIZE = 0xBA55ED50, 1, 16
ENTRY = struct.Struct("<HHIQ12xI")  # kind, attributes, header size, payload size, ..., architecture

LOADED, FOR_LINKERS = ".nv_fatbin", "__nv_relfatbin"


def sections(image):
    """Name -> (offset, size) in the file, of a little-endian ELF64 image."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", image, 0x28)
    row_size, n_rows, names_row = struct.unpack_from("<HHH", image, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", image, table + i * row_size) for i in range(n_rows)]
    names = rows[names_row][4]
    found = {}
    for name, _kind, _flags, _address, offset, size in rows:
        start = names + name
        found[bytes(image[start : image.index(0, start)]).decode()] = (offset, size)
    return found


def entries(image, offset, size):
    """(architecture, start, end) of every payload in the fat binaries of a section."""
    at, section_end = offset, offset + size
    while at + CONTAINER.size <= section_end:
        magic, version, header_size, n_bytes = CONTAINER.unpack_from(image, at)
        if magic == 0:  # padding up to the alignment of the next one
            at += 8
            continue
        if (magic, version, header_size) != (MAGIC, VERSION, HEADER_SIZE):
            raise ValueError(f"unknown fat binary at {at:#x}: this script knows version {VERSION} of the format")
        at += header_size
        end = at + n_bytes
        while at < end:
            _kind, _attributes, entry_header, payload, arch = ENTRY.unpack_from(image, at)
            yield arch, at + entry_header, at + entry_header + payload
            at += entry_header + payload


def main():
    if len(sys.argv) != 4 or not sys.argv[3].isdigit():
        sys.exit(__doc__)
    source, output, wanted = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
    image = bytearray(pathlib.Path(source).read_bytes())
    kept = dropped = 0
    seen = set()
    try:
        found = sections(image)
        if LOADED not in found:
            raise ValueError(f"no section {LOADED}")
        for arch, start, end in entries(image, *found[LOADED]):
            seen.add(arch)
            if arch == wanted:
                kept += end - start
            else:
                image[start:end] = bytes(end - start)
                dropped += end - start
        if not kept:
            raise ValueError(f"no code for sm_{wanted}, only for {', '.join(f'sm_{arch}' for arch in sorted(seen))}")
    except ValueError as problem:
        sys.exit(f"{source}: {problem}")
    offset, size = found.get(FOR_LINKERS, (0, 0))
    image[offset : offset + size] = bytes(size)
    output.write_bytes(image)
    print(f"{output}: kept {kept / 1e6:.1f} MB of sm_{wanted}, zeroed {(dropped + size) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
