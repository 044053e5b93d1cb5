//! Compiles what is not Rust: the CUDA kernels, for GPUs and for the simulator.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(any(feature = "cuda", feature = "simt"))]
    println!("cargo::rerun-if-changed=kernels");
    #[cfg(any(feature = "cuda", feature = "simt"))]
    println!("cargo::rerun-if-env-changed=ATKD_WERROR");
    #[cfg(feature = "cuda")]
    cuda::build();
    #[cfg(feature = "simt")]
    simt();
}

/// CI alone asks for that: a compiler of another version may warn of what these do not.
#[cfg(any(feature = "cuda", feature = "simt"))]
fn warnings_are_errors() -> bool {
    std::env::var_os("ATKD_WERROR").is_some_and(|value| value == "1")
}

/// The kernels as one fat binary, `$OUT_DIR/atkd.fatbin`, which is empty if no nvcc compiled them.
#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::iter;
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output};

    /// Machine code for these, and PTX of the first two for any other: without clusters, and with.
    const ARCHITECTURES: [&str; 4] = ["80", "90", "100", "120"];

    /// The PTX that each of these is compiled from. nvcc makes the same of 100 and of 120, which takes it as long as the
    /// machine code.
    const PTX: [&str; 4] = ["80", "90", "100", "100"];

    /// The first release that knows all of them.
    const LEAST_RELEASE: (u32, u32) = (12, 8);

    const SEARCHED: &str =
        "$NVCC, $CUDA_HOME, $CUDA_PATH, PATH, /usr/local/cuda or Python's packages";

    const HINT: &str = "`pip install nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* \
        nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.*` brings an nvcc without root; then \
        `cargo clean -p atkd`, and build again";

    pub fn build() {
        // Neither PATH nor VIRTUAL_ENV, which differ from shell to shell: each change would compile everything again.
        for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        let fatbin = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("atkd.fatbin");
        let missing = kernels(&fatbin).err().unwrap_or_default();
        if !missing.is_empty() {
            std::fs::write(&fatbin, []).expect("OUT_DIR is writable");
        }
        println!("cargo::rustc-env=ATKD_ARCHITECTURES={}", ARCHITECTURES.join(" "));
        println!("cargo::rustc-env=ATKD_NO_KERNELS={missing}");
    }

    /// Compiles the kernels by the nvcc that is given, or by the first that can of those that are found. The error says
    /// why this build has none.
    fn kernels(fatbin: &Path) -> Result<(), String> {
        const NONE: &str = "the CUDA kernels are not in this build, since";
        if let Some(nvcc) = env::var_os("NVCC") {
            if nvcc.is_empty() {
                return Err(format!("{NONE} it was built with an empty $NVCC"));
            }
            return compile(Path::new(&nvcc), fatbin).inspect_err(|reason| {
                println!("cargo::error=$NVCC cannot compile the CUDA kernels: {reason}");
            });
        }
        let mut reasons = Vec::new();
        for nvcc in search() {
            match compile(&nvcc, fatbin) {
                Ok(()) => return Ok(()),
                Err(reason) => {
                    println!("cargo::warning=an nvcc is passed over: {reason}");
                    reasons.push(reason);
                }
            }
        }
        let why = match &reasons[..] {
            [] => format!("no nvcc was found in {SEARCHED}"),
            reasons => format!("no nvcc that was found can compile them: {}", reasons.join("; ")),
        };
        let missing = format!("{NONE} {why}. {HINT}");
        println!("cargo::warning={missing}. `NVCC= cargo build` asks for none, and says nothing");
        Err(missing)
    }

    /// Every nvcc that is found, the preferred one first. Python is asked only when none before can compile.
    fn search() -> impl Iterator<Item = PathBuf> {
        let toolkits = ["CUDA_HOME", "CUDA_PATH"]
            .into_iter()
            .filter_map(env::var_os)
            .map(|home| Path::new(&home).join("bin"));
        let path = env::var_os("PATH").unwrap_or_default();
        let on_path: Vec<_> = env::split_paths(&path).collect();
        let mut tried = Vec::new();
        toolkits
            .chain(on_path)
            .chain(["/usr/local/cuda/bin".into()])
            .chain(iter::once_with(wheel).flatten())
            .filter(|folder| folder.is_absolute())
            .map(|folder| folder.join(format!("nvcc{}", env::consts::EXE_SUFFIX)))
            .filter(move |nvcc| {
                // A folder may be there twice, by its name or by a link.
                let Ok(file) = nvcc.canonicalize() else { return false };
                let is_new = file.is_file() && !tried.contains(&file);
                tried.push(file);
                is_new
            })
    }

    /// The path of nvcc in NVIDIA's wheels, if the Python on PATH has them.
    fn wheel() -> Option<PathBuf> {
        let script = "import nvidia.cu13 as m; print(list(m.__path__)[0])";
        let output = Command::new("python3").args(["-c", script]).output().ok()?;
        let folder = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Path::new(folder.trim()).join("bin"))
    }

    /// Compiles the kernels, or says in one line which nvcc does not, and why.
    fn compile(nvcc: &Path, fatbin: &Path) -> Result<(), String> {
        if nvcc.is_file() {
            println!("cargo::rerun-if-changed={}", nvcc.display());
        }
        let (least, minor) = LEAST_RELEASE;
        let release = release(nvcc)?;
        if release < LEAST_RELEASE {
            return Err(format!(
                "{} is of CUDA {}.{}, but {least}.{minor} or later is needed",
                nvcc.display(),
                release.0,
                release.1
            ));
        }
        let _ = std::fs::remove_file(fatbin);
        let mut command = Command::new(nvcc);
        command.args([
            "-std=c++17",
            "-O3",
            "--compress-mode=size",
            "--threads",
            "0",
            "-fatbin",
            "-o",
        ]);
        command.arg(fatbin).arg("-Ikernels").arg(super::all_kernels());
        if super::warnings_are_errors() {
            // One warning is of local memory, which no kernel is to need.
            command.args(["-Werror", "all-warnings", "-Xptxas", "-warn-lmem-usage"]);
        }
        for (architecture, ptx) in ARCHITECTURES.iter().zip(PTX) {
            command.arg(format!("-gencode=arch=compute_{ptx},code=sm_{architecture}"));
        }
        for ptx in &ARCHITECTURES[..2] {
            command.arg(format!("-gencode=arch=compute_{ptx},code=compute_{ptx}"));
        }
        run(&mut command)?;
        let written = std::fs::metadata(fatbin).is_ok_and(|file| file.len() > 0);
        written.then_some(()).ok_or_else(|| format!("{} wrote nothing", nvcc.display()))
    }

    /// The release that an nvcc is of, such as (12, 8).
    fn release(nvcc: &Path) -> Result<(u32, u32), String> {
        let output = run(Command::new(nvcc).arg("--version"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let release = text.split_once("release ").and_then(|(_, rest)| {
            let mut numbers = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
        });
        release.ok_or_else(|| format!("{} --version names no release", nvcc.display()))
    }

    /// Runs a compiler to its end; the error is one line. All that the compiler says is in the script's own output.
    fn run(command: &mut Command) -> Result<Output, String> {
        let program = Path::new(command.get_program()).display().to_string();
        let output =
            command.output().map_err(|error| format!("{program} does not start: {error}"))?;
        if output.status.success() {
            return Ok(output);
        }
        let said = [&output.stdout[..], &output.stderr[..]].concat();
        let said = String::from_utf8_lossy(&said);
        eprintln!("{said}");
        let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
        let first = lines.clone().next().unwrap_or("it says nothing");
        let line = lines.find(|line| ["error", "fatal"].iter().any(|word| line.contains(word)));
        Err(format!("{program} fails ({}): {}", output.status, line.unwrap_or(first)))
    }
}

/// One source of all kernels, which includes each file of them.
#[cfg(any(feature = "cuda", feature = "simt"))]
fn all_kernels() -> std::path::PathBuf {
    let files = std::fs::read_dir("kernels").expect("the kernels are in the package");
    let names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".cu")).collect();
    names.sort();
    let includes: String = names.iter().map(|name| format!("#include \"{name}\"\n")).collect();
    let folder = std::env::var_os("OUT_DIR").expect("cargo sets it");
    let path = std::path::PathBuf::from(folder).join("atkd.cu");
    std::fs::write(&path, includes).expect("the build's own folder is writable");
    path
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
        .file(all_kernels())
        .file("kernels/simt/broken.cpp")
        // The kernels read 16 bytes as elements of several types.
        .flag_if_supported("-fno-strict-aliasing")
        .flag_if_supported("-Wall")
        .flag_if_supported("-Wextra")
        .warnings_into_errors(warnings_are_errors())
        .compile("atkd_simt");
}
