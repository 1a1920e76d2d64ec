//! What needs a GPU. Where there is none these tests say so and pass; `FLASHCOMM_REQUIRE_GPU=1` turns that into a failure.

mod exact; // the exact kernel: its bits, and where its epochs wrap around
mod kernels; // the kernels against the scalar codec of wire/, bit for bit
