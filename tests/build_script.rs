//! build.rs, compiled and run by itself, with stand-ins for nvcc: which one it takes, and what it says.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

const NEW: &str = "echo 'Cuda compilation tools, release 13.0, V13.0.88'";
const OLD: &str = "echo 'Cuda compilation tools, release 12.4, V12.4.131'";
/// Writes to the argument after -o.
const WRITES: &str = r#"while [ "$1" != -o ]; do shift; done; echo kernels > "$2""#;
const WARNS: &str =
    r#"case "$*" in *-Werror*) echo 'kernels/atkd.cu(1): error: unused'; exit 2; esac"#;

/// Held while a script is written, and while any process is started, which would inherit the open file: what is open for
/// writing cannot be run.
static FORK: Mutex<()> = Mutex::new(());

/// A folder of this test's own, empty.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("build_script").join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

static SCRIPT: LazyLock<PathBuf> = LazyLock::new(|| {
    let script = folder("script").join("build");
    let output = Command::new("rustc")
        .args(["--edition", "2024", "--cfg", "feature=\"cuda\"", "build.rs", "-o"])
        .arg(&script)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("rustc is on PATH");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    script
});

/// A shell script called nvcc in a folder of its own.
fn nvcc(name: &str, version: &str, compile: &str) -> PathBuf {
    let nvcc = folder(name).join("nvcc");
    let script =
        format!("#!/bin/sh\nif [ \"$1\" = --version ]; then {version}; exit; fi\n{compile}\n");
    let _held = FORK.lock().unwrap_or_else(PoisonError::into_inner);
    fs::write(&nvcc, script).unwrap();
    fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755)).unwrap();
    nvcc
}

struct Run {
    succeeds: bool,
    /// The build has kernels.
    kernels: bool,
    stdout: String,
}

impl Run {
    /// The words that follow an instruction to cargo.
    fn all(&self, instruction: &str) -> Vec<&str> {
        let start = format!("cargo::{instruction}=");
        self.stdout.lines().filter_map(|line| line.strip_prefix(&start)).collect()
    }

    /// Why the build has no kernels, as `Kernels::load` says it.
    fn hint(&self) -> &str {
        let values = self.all("rustc-env");
        values.iter().find_map(|value| value.strip_prefix("ATKD_NO_KERNELS=")).unwrap()
    }
}

/// Runs the script where PATH has these compilers, with other variables beside it.
fn run(name: &str, on_path: &[&Path], variables: &[(&str, &str)]) -> Run {
    let out = folder(name);
    // Cargo leaves that of an earlier build there.
    fs::write(out.join("atkd.fatbin"), "stale").unwrap();
    let path = std::env::join_paths(on_path.iter().map(|nvcc| nvcc.parent().unwrap())).unwrap();
    let script = &*SCRIPT;
    let _held = FORK.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Command::new(script)
        .env_clear()
        .env("OUT_DIR", &out)
        .env("PATH", path)
        .envs(variables.iter().copied())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let fatbin = fs::read_to_string(out.join("atkd.fatbin")).unwrap_or_default();
    assert!(!fatbin.contains("stale"), "{stdout}");
    Run {
        succeeds: output.status.success() && !stdout.contains("cargo::error"),
        kernels: !fatbin.is_empty(),
        stdout,
    }
}

/// True if this machine has an nvcc that is found without PATH; then nothing can be said of builds without any.
fn another_nvcc() -> bool {
    let found = Path::new("/usr/local/cuda/bin/nvcc").is_file();
    if found {
        eprintln!("SKIPPED: builds without kernels: /usr/local/cuda has an nvcc");
    }
    found
}

#[test]
fn an_old_nvcc_is_passed_over_for_a_newer_one() {
    let (old, new) = (nvcc("old-1", OLD, WRITES), nvcc("new-1", NEW, WRITES));
    let run = run("out-1", &[&old, &new], &[]);
    assert!(run.succeeds && run.kernels, "{}", run.stdout);
    let warnings = run.all("warning");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    for part in [old.to_str().unwrap(), "12.4", "12.8"] {
        assert!(warnings[0].contains(part), "{warnings:?}");
    }
    assert_eq!(run.hint(), "");
}

/// Whatever is wrong with it, the build goes on without kernels, and says so twice: to who builds, and in `Kernels::load`.
#[test]
fn an_nvcc_that_cannot_compile_breaks_no_build() {
    let unsupported =
        "echo \"nvcc fatal   : Unsupported gpu architecture 'compute_120'\" >&2; exit 1";
    let no_host =
        "echo; echo 'nvcc warning : deprecated'; echo 'kernels/atkd.cu(1): error: no g++'; exit 2";
    for (i, (version, compile, why)) in [
        (OLD, WRITES, "of CUDA 12.4, but 12.8 or later is needed"),
        (NEW, unsupported, "Unsupported gpu architecture 'compute_120'"),
        (NEW, no_host, "kernels/atkd.cu(1): error: no g++"),
        (NEW, "kill -9 $$", "signal: 9"),
        (NEW, "exit 0", "wrote nothing"),
        ("echo 'a wrapper'", WRITES, "names no release"),
        ("exit 3", WRITES, "exit status: 3"),
    ]
    .into_iter()
    .enumerate()
    {
        let nvcc = nvcc(&format!("wrong-{i}"), version, compile);
        if another_nvcc() {
            return;
        }
        // By a link too, as on systems where /bin is /usr/bin.
        let linked = folder(&format!("linked-{i}")).join("bin");
        std::os::unix::fs::symlink(nvcc.parent().unwrap(), &linked).unwrap();
        let run = run(&format!("out-wrong-{i}"), &[&nvcc, &linked.join("nvcc")], &[]);
        assert!(run.succeeds && !run.kernels, "{}", run.stdout);
        assert_eq!(run.all("warning").len(), 2, "{}", run.stdout);
        for said in [run.all("warning")[0], run.all("warning")[1], run.hint()] {
            assert!(said.contains(why) && said.contains(nvcc.to_str().unwrap()), "{said}");
        }
        assert!(run.all("rerun-if-changed").contains(&nvcc.to_str().unwrap()));
    }
}

#[test]
fn without_nvcc_there_are_no_kernels() {
    if another_nvcc() {
        return;
    }
    let run = run("out-none", &[], &[("CUDA_HOME", ""), ("CUDA_PATH", "/nowhere")]);
    assert!(run.succeeds && !run.kernels, "{}", run.stdout);
    assert_eq!(run.all("warning").len(), 1, "{}", run.stdout);
    assert!(run.hint().contains("no nvcc was found") && run.hint().contains("pip install"));
}

/// Who names an nvcc wants its kernels.
#[test]
fn a_given_nvcc_that_cannot_compile_is_an_error() {
    let (old, new) = (nvcc("old-2", OLD, WRITES), nvcc("new-2", NEW, WRITES));
    for (given, why) in [
        (old.to_str().unwrap(), "of CUDA 12.4, but 12.8 or later is needed"),
        ("/nowhere/nvcc", "/nowhere/nvcc does not start: No such file"),
    ] {
        let run = run("out-2", &[&new], &[("NVCC", given)]);
        assert!(!run.succeeds, "{}", run.stdout);
        let errors = run.all("error");
        assert!(errors.len() == 1 && errors[0].contains(why), "{errors:?}");
    }
    let given = run("out-2", &[&old], &[("NVCC", new.to_str().unwrap())]);
    assert!(given.succeeds && given.kernels && given.all("warning").is_empty(), "{}", given.stdout);
}

#[test]
fn an_empty_nvcc_asks_for_none() {
    let new = nvcc("new-3", NEW, WRITES);
    let run = run("out-3", &[&new], &[("NVCC", "")]);
    assert!(run.succeeds && !run.kernels, "{}", run.stdout);
    assert_eq!(run.all("warning"), [""; 0]);
    assert!(run.hint().contains("empty $NVCC"), "{}", run.hint());
}

/// An editor and a shell differ in PATH, and take turns at building.
#[test]
fn another_path_compiles_nothing_again() {
    let new = nvcc("new-4", NEW, WRITES);
    let run = run("out-4", &[&new], &[]);
    assert_eq!(run.all("rerun-if-env-changed"), ["ATKD_WERROR", "NVCC", "CUDA_HOME", "CUDA_PATH"]);
    assert_eq!(run.all("rerun-if-changed"), ["build.rs", "kernels", new.to_str().unwrap()]);
}

#[test]
fn warnings_are_errors_only_where_they_are_asked_for() {
    let new = nvcc("new-5", NEW, &format!("{WARNS}\n{WRITES}"));
    let new = new.to_str().unwrap();
    for (werror, succeeds) in [(None, true), (Some("0"), true), (Some("1"), false)] {
        let variables: Vec<_> =
            werror.into_iter().map(|value| ("ATKD_WERROR", value)).chain([("NVCC", new)]).collect();
        let run = run("out-5", &[], &variables);
        assert_eq!((run.succeeds, run.kernels), (succeeds, succeeds), "{werror:?}: {}", run.stdout);
    }
}
