//! A disk without data, to measure what the device itself costs: reads leave the buffers as they are.

use std::{io, os::fd::RawFd};

use super::{Access, Action, Backend, Completion, Geometry, Image, Job};

/// An image of this many bytes, of which none is kept.
#[derive(Clone, Copy, Debug)]
pub struct NullImage(pub u64);

impl Image for NullImage {
    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn geometry(&self) -> Geometry {
        Geometry::plain()
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0)
    }

    fn resize(&self, _size: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn backend(&self, _name: &str, depth: u16) -> io::Result<Box<dyn Backend>> {
        Ok(Box::new(Null {
            done: Vec::with_capacity(depth.into()),
        }))
    }
}

struct Null {
    /// Tag and size of the jobs that are done.
    done: Vec<(u16, usize)>,
}

impl Backend for Null {
    unsafe fn submit(&mut self, job: Job<'_>) -> io::Result<()> {
        let size = match job.action {
            Action::Read | Action::Write => job.length as usize,
            Action::Flush | Action::Discard | Action::WriteZeroes(_) => 0,
        };
        self.done.push((job.tag, size));
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completed(&mut self) -> Option<Completion> {
        let (tag, size) = self.done.pop()?;
        Some(Completion {
            tag,
            result: Ok(size),
        })
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn descriptor(&self) -> Option<RawFd> {
        None
    }
}
