//! Loads the simulated driver; its name, libcuda.so, then stands for it in every test of the process.

use std::sync::OnceLock;

use libloading::Library;

pub static DRIVER: OnceLock<Library> = OnceLock::new();

/// Before `main`, since a test's thread may be the first to look for the driver.
pub extern "C" fn load_driver() {
    // A cache without room takes several blocks to all rows that are long enough.
    // SAFETY: there is no other thread yet.
    unsafe { std::env::set_var("ATKD_SIMT_L2_BYTES", "1") };
    let test = std::env::current_exe().expect("this process has a file");
    let driver = test.with_file_name("libatkd_simt_driver.so");
    // SAFETY: the library does nothing when it is loaded.
    let loaded = unsafe { Library::new(&driver) };
    let loaded = loaded.unwrap_or_else(|error| panic!("{}: {error}", driver.display()));
    DRIVER.get_or_init(|| loaded);
    // Its functions of cuBLASLt and NCCL are looked for under these names, in a folder where only these tests do: see build.rs.
    for name in ["cublasLt", "nccl"] {
        let link = format!("{}/simulated/lib{name}.so", env!("OUT_DIR"));
        match std::os::unix::fs::symlink(&driver, &link) {
            // By another test's process.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            linked => linked.unwrap_or_else(|error| panic!("{link}: {error}")),
        }
    }
}
