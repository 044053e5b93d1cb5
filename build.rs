//! Compiles what is not Rust.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "simt")]
    simt();
}

/// The CUDA kernels as host C++, for the simulator.
#[cfg(feature = "simt")]
fn simt() {
    println!("cargo::rerun-if-changed=kernels");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .include("kernels")
        .file("kernels/simt/kernels.cpp")
        .file("kernels/simt/broken.cpp")
        // The kernels read 16 bytes as elements of several types.
        .flag_if_supported("-fno-strict-aliasing")
        // As on the GPU only where the source says so: a * b + c may become one instruction.
        .flag_if_supported("-Wall")
        .flag_if_supported("-Wextra")
        .warnings_into_errors(true)
        .compile("atkd_simt");
}
