//! Compiles what is not Rust: the CUDA kernels, for GPUs and for the simulator.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(any(feature = "cuda", feature = "simt"))]
    println!("cargo::rerun-if-changed=kernels");
    #[cfg(feature = "cuda")]
    cuda::build();
    #[cfg(feature = "simt")]
    simt();
}

/// The kernels as one fat binary, `$OUT_DIR/atkd.fatbin`, which is empty if there is no nvcc.
#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Machine code for these, and PTX of the first two for any other: without clusters, and with.
    const ARCHITECTURES: [&str; 4] = ["80", "90", "100", "120"];

    const HINT: &str = "the CUDA kernels are not in this build, since no nvcc was found in $NVCC, $CUDA_HOME, \
        $CUDA_PATH, PATH, /usr/local/cuda or Python's packages; `pip install nvidia-cuda-nvcc==13.0.* \
        nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.*` \
        brings one without root; then build again";

    pub fn build() {
        for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "VIRTUAL_ENV"] {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        let fatbin = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("atkd.fatbin");
        println!("cargo::rustc-env=ATKD_ARCHITECTURES={}", ARCHITECTURES.join(" "));
        println!("cargo::rustc-env=ATKD_NO_KERNELS={HINT}");
        match nvcc() {
            Some(nvcc) => compile(&nvcc, &fatbin),
            None => {
                println!("cargo::warning={HINT}");
                std::fs::write(&fatbin, []).expect("OUT_DIR is writable");
            }
        }
    }

    fn compile(nvcc: &Path, fatbin: &Path) {
        let mut command = Command::new(nvcc);
        command
            .args(["-std=c++17", "-O3", "-Werror", "all-warnings", "--compress-mode=size"])
            .args(["--threads", "0", "-fatbin", "-o"]);
        command.arg(fatbin).arg("kernels/atkd.cu");
        for architecture in ARCHITECTURES {
            command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
        }
        for ptx in &ARCHITECTURES[..2] {
            command.arg(format!("-gencode=arch=compute_{ptx},code=compute_{ptx}"));
        }
        let output = command
            .output()
            .unwrap_or_else(|error| panic!("{} does not start: {error}", nvcc.display()));
        assert!(
            output.status.success(),
            "{} could not compile the kernels (CUDA 12.8 or later is needed):\n{}{}",
            nvcc.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn nvcc() -> Option<PathBuf> {
        let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
        let path = |variable| env::var_os(variable).map(PathBuf::from);
        if let Some(nvcc) = path("NVCC") {
            assert!(nvcc.is_file(), "$NVCC is {}, which is no file", nvcc.display());
            return Some(nvcc);
        }
        let toolkits =
            ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(path).map(|home| home.join("bin"));
        let search = env::var_os("PATH").unwrap_or_default();
        toolkits
            .chain(env::split_paths(&search))
            .chain(["/usr/local/cuda/bin".into()])
            .chain(wheel())
            .map(|folder| folder.join(&name))
            .find(|nvcc| nvcc.is_file())
    }

    /// Where NVIDIA's wheels put nvcc, if the Python on PATH has them.
    fn wheel() -> Option<PathBuf> {
        let script = "import nvidia.cu13 as m; print(list(m.__path__)[0])";
        let output = Command::new("python3").args(["-c", script]).output().ok()?;
        let folder = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Path::new(folder.trim()).join("bin"))
    }
}

/// The kernels as host C++.
#[cfg(feature = "simt")]
fn simt() {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .include("kernels")
        // The suffix says CUDA, but the compiler is the host's.
        .flag("-xc++")
        .file("kernels/atkd.cu")
        .file("kernels/simt/broken.cpp")
        // The kernels read 16 bytes as elements of several types.
        .flag_if_supported("-fno-strict-aliasing")
        .flag_if_supported("-Wall")
        .flag_if_supported("-Wextra")
        .warnings_into_errors(true)
        .compile("atkd_simt");
}
