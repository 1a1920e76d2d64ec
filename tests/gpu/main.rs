//! What needs a GPU. Where there is none these tests say so and pass; `FLASHCOMM_REQUIRE_GPU=1` turns that into a failure.

mod kernels; // the kernels against the scalar codec of wire/, bit for bit
