//! qcow2 images, by the crate `imago`. Its calls block, so they are made by the threads of a [`Pool`].

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder,
    file::File as Storage,
    format::PreallocateMode,
    io_buffers::{IoVector, IoVectorMut},
    qcow2::Qcow2,
    raw::Raw,
};
use vm_memory::VolatileSlice;

use super::{Backing, ImageError, ImageOptions, header, open_file};
use crate::virtio::block::backend::{
    Access, Action, Backend, Blocking, Geometry, Image, Job, Pool, Unmap,
};

/// How many images may stand on one another. QEMU has no limit, but a chain that leads back to itself must end.
const MOST_LAYERS: usize = 32;

/// A qcow2 image with those it builds on.
pub(super) struct Qcow2Image {
    layers: Arc<Layers>,
    access: Access,
    geometry: Geometry,
}

/// The images. Reads and writes go side by side; what takes clusters away has the image for itself.
struct Layers(RwLock<FormatAccess<Storage>>);

impl Qcow2Image {
    /// The image in `file`, which was opened as `options` say.
    pub(super) fn open(file: File, options: &ImageOptions) -> Result<Self, ImageError> {
        let image = open_layer(file, options, &options.path, options.access, MOST_LAYERS)?;
        let cluster = image.inner().zero_granularity();
        let can_discard = options.access == Access::ReadWrite && cluster.is_some();
        let cluster = cluster
            .and_then(|cluster| u32::try_from(cluster).ok())
            .unwrap_or(65536);
        let geometry = Geometry {
            block_size: 512,
            physical_block_size: 4096,
            optimal_size: cluster,
            // The crate aligns what needs it.
            memory_alignment: 1,
            discard_granularity: can_discard.then_some(cluster),
            can_write_zeroes: options.access == Access::ReadWrite,
        };
        Ok(Self {
            layers: Arc::new(Layers(RwLock::new(image))),
            access: options.access,
            geometry,
        })
    }
}

/// Opens the image in `file` and, before it, those below.
fn open_layer(
    file: File,
    options: &ImageOptions,
    path: &Path,
    access: Access,
    layers: usize,
) -> Result<FormatAccess<Storage>, ImageError> {
    let buffered = File::open(path).map_err(ImageError::host(path, "read"))?;
    if let Some(what) =
        header::objection(&buffered, access).map_err(ImageError::host(path, "read"))?
    {
        return Err(ImageError::refused(path, what));
    }
    let below = match named_below(buffered, path)? {
        None => None,
        Some(_) if options.backing == Backing::Refuse => {
            return Err(ImageError::refused(
                path,
                "builds on another file: say backing_files=on if that is meant",
            ));
        }
        Some(_) if layers <= 1 => {
            return Err(ImageError::refused(
                path,
                format!("builds on more than {MOST_LAYERS} others, or on itself"),
            ));
        }
        Some(below) => Some(open_below(&below, options, path, layers - 1)?),
    };
    let host = || ImageError::host(path, "open qcow2");
    let storage = Storage::try_from(file).map_err(host())?;
    let image = Qcow2::<Storage>::builder(storage)
        .write(access == Access::ReadWrite)
        .backing(below)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())
        .map_err(host())?;
    Ok(FormatAccess::new(image))
}

/// A backing file as an image names it.
struct Below {
    path: PathBuf,
    format: Option<String>,
}

fn named_below(file: File, path: &Path) -> Result<Option<Below>, ImageError> {
    let host = || ImageError::host(path, "open qcow2");
    let storage = Storage::try_from(file).map_err(host())?;
    let image = Qcow2::<Storage>::open_image(storage, false).map_err(host())?;
    Ok(image.implicit_backing_file().map(|name| Below {
        path: path.parent().unwrap_or(Path::new("")).join(name),
        format: image.implicit_backing_format().cloned(),
    }))
}

fn open_below(
    below: &Below,
    options: &ImageOptions,
    path: &Path,
    layers: usize,
) -> Result<FormatAccess<Storage>, ImageError> {
    let file = || open_file(&below.path, Access::ReadOnly, options.cache);
    match below.format.as_deref() {
        Some("qcow2") => open_layer(file()?, options, &below.path, Access::ReadOnly, layers),
        Some("raw") => {
            let host = || ImageError::host(&below.path, "open");
            let storage = Storage::try_from(file()?).map_err(host())?;
            let image = Raw::builder(storage)
                .open(DenyImplicitOpenGate::default())
                .map_err(host())?;
            Ok(FormatAccess::new(image))
        }
        Some(format) => Err(ImageError::refused(
            path,
            format!("builds on an image of format {format:?}: only raw and qcow2 can be used"),
        )),
        None => Err(ImageError::refused(
            path,
            "does not say what format its backing file has: tell it with `qemu-img rebase -u -F`",
        )),
    }
}

impl Layers {
    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<Storage>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<Storage>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image for Qcow2Image {
    fn access(&self) -> Access {
        self.access
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.layers.shared().size())
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        self.layers.alone().resize(size, PreallocateMode::None)
    }

    fn backend(&self, name: &str, depth: u16) -> io::Result<Box<dyn Backend>> {
        Ok(Box::new(Pool::new(&self.layers, name, depth)?))
    }
}

impl Blocking for Layers {
    unsafe fn run(&self, job: &Job<'_>) -> io::Result<usize> {
        // SAFETY: the caller vouches for the buffers.
        let slices = || unsafe { slices(job.vectors) };
        match job.action {
            Action::Read => {
                let slices = slices();
                let (buffers, _guard) = IoVectorMut::from_volatile_slice(&slices[..]);
                self.shared().readv(buffers, job.offset)?;
            }
            Action::Write => {
                let slices = slices();
                let (buffers, _guard) = IoVector::from_volatile_slice(&slices[..]);
                self.shared().writev(buffers, job.offset)?;
            }
            Action::Flush => {
                let image = self.shared();
                image.flush()?;
                image.sync()?;
                return Ok(0);
            }
            Action::Discard => {
                self.alone().discard_to_any(job.offset, job.length)?;
                return Ok(0);
            }
            Action::WriteZeroes(Unmap::Allowed) => {
                let mut image = self.alone();
                match image.discard_to_zero(job.offset, job.length) {
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                        image.write_zeroes(job.offset, job.length)?;
                    }
                    result => result?,
                }
                return Ok(0);
            }
            Action::WriteZeroes(Unmap::Forbidden) => {
                self.shared().write_zeroes(job.offset, job.length)?;
                return Ok(0);
            }
        }
        Ok(job.length as usize)
    }
}

/// The buffers of a job as `imago` takes them, which has no room for empty ones.
///
/// # Safety
/// The buffers stay valid while the slices live.
unsafe fn slices(vectors: &[libc::iovec]) -> Vec<VolatileSlice<'_>> {
    vectors
        .iter()
        .filter(|vector| vector.iov_len > 0)
        .map(|vector| {
            // SAFETY: as above.
            unsafe { VolatileSlice::new(vector.iov_base.cast(), vector.iov_len) }
        })
        .collect()
}
