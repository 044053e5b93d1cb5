//! A file that is there whole or not at all.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use tempfile::{NamedTempFile, TempPath};

/// The gradient's file. Until all of it is written it is in another file in the same folder, which has no name where the system
/// knows such files: then nothing is left of it, however the program ends.
pub struct Destination {
    /// Links followed.
    path: PathBuf,
    folder: PathBuf,
    temporary: Temporary,
}

enum Temporary {
    #[cfg(target_os = "linux")]
    Unnamed(File),
    Named(NamedTempFile),
}

impl Destination {
    /// This says before anything is computed if it cannot be written there.
    pub fn open(path: &Path, input: &Path) -> Result<Self> {
        check(path, input)?;
        let cannot = |error: io::Error| anyhow!("cannot write {}: {error}", path.display());
        let path = follow(path).map_err(cannot)?;
        let folder = folder(&path).to_owned();
        if !folder.is_dir() {
            bail!("cannot write {}: there is no folder {}", path.display(), folder.display());
        }
        let temporary = Temporary::new(&folder)
            .map_err(|error| anyhow!("cannot write to the folder {}: {error}", folder.display()))?;
        Ok(Self { path, folder, temporary })
    }

    /// Writes the file from `parts`, one after the other, in place of what is there.
    pub fn write<'a>(self, parts: impl IntoIterator<Item = &'a [u8]>) -> Result<()> {
        let path = self.path.clone();
        self.try_write(parts).map_err(|error| anyhow!("cannot write {}: {error}", path.display()))
    }

    fn try_write<'a>(mut self, parts: impl IntoIterator<Item = &'a [u8]>) -> io::Result<()> {
        let file = match &mut self.temporary {
            #[cfg(target_os = "linux")]
            Temporary::Unnamed(file) => file,
            Temporary::Named(file) => file.as_file_mut(),
        };
        for part in parts {
            file.write_all(part)?;
        }
        self.temporary.name(&self.folder)?.persist(self.path).map_err(|error| error.error)
    }
}

impl Temporary {
    fn new(folder: &Path) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        if let Some(file) = unnamed(folder) {
            return Ok(Self::Unnamed(file));
        }
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Any new file asks for this; the user's umask takes its share.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        builder.tempfile_in(folder).map(Self::Named)
    }

    /// Its name in the folder.
    fn name(self, folder: &Path) -> io::Result<TempPath> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Unnamed(file) => {
                use rustix::fs::{AtFlags, CWD, linkat};
                let unnamed = descriptor(&file);
                // A link replaces nothing: the name is a new one, for a moment.
                let link =
                    |name: &Path| Ok(linkat(CWD, &unnamed, CWD, name, AtFlags::SYMLINK_FOLLOW)?);
                Ok(tempfile::Builder::new().make_in(folder, link)?.into_temp_path())
            }
            Self::Named(file) => Ok(file.into_temp_path()),
        }
    }
}

/// A file without a name, if the folder's file system has such and it can be given one later.
#[cfg(target_os = "linux")]
fn unnamed(folder: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::TMPFILE.bits() as i32;
    let file = OpenOptions::new().write(true).custom_flags(flags).open(folder).ok()?;
    descriptor(&file).exists().then_some(file)
}

#[cfg(target_os = "linux")]
fn descriptor(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// The gradient replaces what is at `path`, which must be a file that can be written to, and not the one it is computed
/// from.
fn check(path: &Path, input: &Path) -> Result<()> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
                bail!("--grad {} names a directory, but must name a file", path.display());
            }
            return Ok(());
        }
        Err(error) => bail!("cannot write {}: {error}", path.display()),
    };
    if !metadata.is_file() {
        let kind = if metadata.is_dir() { "a directory" } else { "a device or pipe" };
        bail!(
            "--grad {} is {kind}, but must be a regular file or a new name; leave --grad out if the \
             gradient is not wanted",
            path.display()
        );
    }
    if let (Ok(path), Ok(input)) = (path.canonicalize(), input.canonicalize())
        && path == input
    {
        bail!(
            "--grad {} is the file that the logits are read from; give the gradient another name",
            path.display()
        );
    }
    // Root may write to it nevertheless.
    if metadata.permissions().readonly() {
        bail!("cannot write {}: the file is read-only", path.display());
    }
    OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(|error| anyhow!("cannot write {}: {error}", path.display()))?;
    Ok(())
}

/// Follows symbolic links to the path that they lead to, even if there is no file yet.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..40 {
        match std::fs::read_link(&path) {
            Ok(target) => path = folder(&path).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
