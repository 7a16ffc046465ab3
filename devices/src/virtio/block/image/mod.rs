//! Disk images: found out what they are, locked and opened.
//!
//! A guest that owns a raw image may write anything to it, also the header of another format that names files of the host.
//! So the contents of a file never make the host open another one: backing files are opened only for a caller who said so
//! ([`Backing::Open`]), and one who did gets no raw image that could be turned into something else.

mod header;
mod lock;
mod qcow2;
mod raw;

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use thiserror::Error;

use super::backend::{Access, Image};
use lock::Locked;
use qcow2::Qcow2Image;
use raw::RawImage;

pub use raw::Engine;
pub(super) use raw::RawFile;

/// How long to wait for a lock. The kernel takes down the io_uring of a process that was killed when it gets to it, and keeps
/// its files, with their locks, until then: a machine that is started anew at once would find itself in the way.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the bytes of an image mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Those of the disk.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// Whether the host's page cache is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// It is.
    Buffered,
    /// It is not (`O_DIRECT`).
    Direct,
}

/// What to do with an image that builds on others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Refuse it.
    Refuse,
    /// Open the files that it names.
    Open,
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// Where it is.
    pub path: PathBuf,
    /// Whether it is written to.
    pub access: Access,
    /// Whether the page cache is used.
    pub cache: Cache,
    /// What it is; `None` to look.
    pub format: Option<Format>,
    /// Whether it may build on others.
    pub backing: Backing,
    /// How raw images are worked on.
    pub engine: Engine,
}

impl ImageOptions {
    /// A writable, buffered image at `path` that stands for itself.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            access: Access::ReadWrite,
            cache: Cache::Buffered,
            format: None,
            backing: Backing::Refuse,
            engine: Engine::Best,
        }
    }
}

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The host did not do what it was asked for.
    #[error("cannot {what} disk image {}", path.display())]
    Host {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// Another process, or this one, has the image.
    #[error("disk image {} is in use elsewhere{}", path.display(), match access {
        Access::ReadOnly => " and written to",
        Access::ReadWrite => "",
    })]
    InUse {
        /// The image.
        path: PathBuf,
        /// What it was to be opened for.
        access: Access,
    },
    /// It is something that Rota has no code for, or none that is safe.
    #[error("disk image {} {what}", path.display())]
    Refused {
        /// The image.
        path: PathBuf,
        /// What is wrong with it, as a predicate.
        what: String,
    },
}

impl ImageError {
    fn host(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Host { path, what, source }
    }

    fn refused(path: &Path, what: impl Into<String>) -> Self {
        Self::Refused {
            path: path.to_owned(),
            what: what.into(),
        }
    }
}

/// Opens an image.
///
/// # Errors
/// When it is in use, is not what it should be, or cannot be opened.
pub fn open(options: &ImageOptions) -> Result<Arc<dyn Image>, ImageError> {
    let path = &options.path;
    let file = open_file(path, options.access, options.cache)?;
    let format = match options.format {
        Some(format) => format,
        None => detect(path)?,
    };
    match format {
        Format::Raw if options.backing == Backing::Open => Err(ImageError::refused(
            path,
            "is raw, and raw images have no backing files: leave backing_files off",
        )),
        Format::Raw => {
            let image = RawImage::new(file, options.access, options.cache, options.engine)
                .map_err(ImageError::host(path, "use"))?;
            Ok(Arc::new(image))
        }
        Format::Qcow2 => Ok(Arc::new(Qcow2Image::open(file, options)?)),
    }
}

/// Opens and locks the file of an image, for who knows what its bytes mean.
///
/// # Errors
/// When it is no file or block device, is in use, or cannot be opened.
pub fn open_file(path: &Path, access: Access, cache: Cache) -> Result<File, ImageError> {
    let kind = std::fs::metadata(path)
        .map_err(ImageError::host(path, "open"))?
        .file_type();
    // Before it is opened: a pipe would wait for somebody at its other end.
    if !kind.is_file() && !kind.is_block_device() {
        return Err(ImageError::refused(
            path,
            "is neither a file nor a block device",
        ));
    }
    let direct = match cache {
        Cache::Buffered => 0,
        Cache::Direct => libc::O_DIRECT,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(access == Access::ReadWrite)
        .custom_flags(direct)
        .open(path)
        .map_err(ImageError::host(path, "open"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match lock::lock(&file, access).map_err(ImageError::host(path, "lock"))? {
            Locked::Yes => return Ok(file),
            Locked::Elsewhere if Instant::now() < deadline => thread::sleep(PATIENCE / 20),
            Locked::Elsewhere => {
                return Err(ImageError::InUse {
                    path: path.to_owned(),
                    access,
                });
            }
        }
    }
}

/// What images of Hyper-V and Azure begin with: VHDX, and VHD unless it is of fixed size. Those have it in their last sector.
const VHDX: [u8; 8] = *b"vhdxfile";
const VHD: [u8; 8] = *b"conectix";
const SECTOR: u64 = 512;

/// Says what format the file at `path` looks like.
fn detect(path: &Path) -> Result<Format, ImageError> {
    // Not through the descriptor of the image, which may want aligned buffers.
    let mut file = File::open(path).map_err(ImageError::host(path, "read"))?;
    let length = file
        .seek(SeekFrom::End(0))
        .map_err(ImageError::host(path, "read"))?;
    let bytes_at = |offset| {
        let mut bytes = [0; 8];
        match file.read_exact_at(&mut bytes, offset) {
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                Err(ImageError::host(path, "read")(error))
            }
            _ => Ok(bytes),
        }
    };
    let convert = |what| {
        let text = format!(
            "looks like a {what} image, which Rota cannot use: convert it (qemu-img convert -O qcow2), or say image_type=raw if its \
             bytes are the disk's"
        );
        Err(ImageError::refused(path, text))
    };
    let start = bytes_at(0)?;
    if start[..4] == header::MAGIC {
        Ok(Format::Qcow2)
    } else if start == VHDX {
        convert("VHDX")
    } else if start == VHD || bytes_at(length.saturating_sub(SECTOR))? == VHD {
        convert("VHD")
    } else {
        Ok(Format::Raw)
    }
}
