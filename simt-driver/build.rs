//! Gives the library the name by which a driver is looked for. Its file keeps its own: cargo puts
//! target/debug/deps on LD_LIBRARY_PATH, where a libcuda.so would take the real driver's place. Its tests look for cuBLASLt
//! in a folder of their own, and there first, which is why that is an RPATH and no RUNPATH.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    let folder = format!("{}/simulated", std::env::var("OUT_DIR").expect("cargo sets it"));
    // The loader forgets a folder that is not there when a process starts.
    std::fs::create_dir_all(&folder).expect("the build's own folder is writable");
    println!("cargo::rustc-link-arg-tests=-Wl,--disable-new-dtags,-rpath,{folder}");
}
