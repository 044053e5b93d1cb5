//! Gives the library the name by which a driver is looked for. Its file keeps its own: cargo puts
//! target/debug/deps on LD_LIBRARY_PATH, where a libcuda.so would take the real driver's place.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
}
