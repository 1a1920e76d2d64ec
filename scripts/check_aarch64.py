#!/usr/bin/env python3
"""Runs the aarch64 jumps of src/real/table.rs and src/abi/forward.rs under qemu, on a machine of another kind.

The assembly is taken out of the Rust source as it stands, put beside a C program that plays the resolver and the real
function, and called: integer, vector and stack arguments and structures returned must arrive as they were, on the first
call (which resolves) and on the second (which only jumps).

Needs aarch64-linux-gnu-gcc and qemu-aarch64-static (Debian: gcc-aarch64-linux-gnu, qemu-user-static).
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"

HARNESS = """
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct { char internal[128]; } unique_id;
typedef struct { double x[5]; } five;  // too many for registers, so it is returned where x8 points

extern void* table[8];
extern void stub(void);
static int n_resolved;

static five real(int a, int b, int c, int d, int e, int f, int g, int h, double v0, double v1, double v2, double v3,
                 double v4, double v5, double v6, double v7, int on_stack, unique_id id) {
  double sum = a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h;
  double vectors = v0 + 2 * v1 + 3 * v2 + 4 * v3 + 5 * v4 + 6 * v5 + 7 * v6 + 8 * v7;
  return (five){{sum, vectors, on_stack, id.internal[0] * 1000, id.internal[127]}};
}

// Uses every register it may, as a resolver does.
void* resolve_in_c(uint32_t slot) {
  n_resolved += slot == 5;
  asm volatile("movi v0.2d, #0\\n movi v1.2d, #0\\n movi v2.2d, #0\\n movi v3.2d, #0\\n movi v4.2d, #0\\n"
               "movi v5.2d, #0\\n movi v6.2d, #0\\n movi v7.2d, #0\\n mov x8, #-1\\n mov x1, #-1\\n mov x7, #-1"
               ::: "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "x8", "x1", "x7");
  table[5] = (void*)real;
  return (void*)real;
}

extern five jump(int, int, int, int, int, int, int, int, double, double, double, double, double, double, double, double,
                 int, unique_id);

int main(void) {
  table[5] = (void*)stub;
  unique_id id;
  memset(&id, 7, sizeof id);
  id.internal[127] = 9;
  for (int i = 0; i < 3; ++i) {
    five got = jump(1, 2, 3, 4, 5, 6, 7, 8, .5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 77, id);
    if (got.x[0] != 204 || got.x[1] != 186 || got.x[2] != 77 || got.x[3] != 7000 || got.x[4] != 9) {
      printf("call %d: %g %g %g %g %g\\n", i, got.x[0], got.x[1], got.x[2], got.x[3], got.x[4]);
      return 1;
    }
  }
  if (n_resolved != 1) return printf("resolved %d times\\n", n_resolved), 1;
  return 0;
}
"""


def blocks(source):
    """The instructions of each naked aarch64 function of a Rust file, in order."""
    found = []
    for part in (ROOT / source).read_text().split('#[cfg(target_arch = "aarch64")]')[1:]:
        macro = part[part.index("naked_asm!(") :]
        before_operands = macro[: re.search(r"\b\w+ = (sym|const)\b", macro).start()]
        found.append(re.findall(r'"([^"]*)"', before_operands))
    return found


def main():
    missing = [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]
    if missing:
        print(f"SKIPPED: no {' and no '.join(missing)}; the aarch64 jumps were not run")
        return
    (stub, resolve_and_go), (jump,) = blocks("src/real/table.rs"), blocks("src/abi/forward.rs")
    operands = {"i": "5", "go": "resolve_and_go", "resolve": "resolve_in_c", "table": "table", "offset": "40"}
    text = [".data", ".balign 8", ".globl table", "table: .skip 64", ".text"]
    for name, instructions in [("stub", stub), ("resolve_and_go", resolve_and_go), ("jump", jump)]:
        assert instructions, name
        text += [".balign 4", f".globl {name}", f"{name}:"]
        text += ["    " + re.sub(r"\{(\w+)\}", lambda match: operands[match[1]], line) for line in instructions]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "jumps.s").write_text("\n".join(text) + "\n")
        (folder / "harness.c").write_text(HARNESS)
        program = folder / "harness"
        subprocess.run([COMPILER, "-O1", "-static", folder / "harness.c", folder / "jumps.s", "-o", program], check=True)
        if subprocess.run([EMULATOR, program]).returncode:
            sys.exit("the aarch64 jumps lose something")
    print("the aarch64 jumps pass every argument and result")


if __name__ == "__main__":
    main()
