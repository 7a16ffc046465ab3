//! System calls on buffers in guest memory.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::super::Buffers;

/// The most buffers that the kernel takes at once (`UIO_MAXIOV`).
const MOST_VECTORS: usize = 1024;

/// A list of buffers for one system call.
#[derive(Default)]
pub(super) struct Vectors(Vec<libc::iovec>);

// SAFETY: the list is filled and used within one call, and nothing is read out of it afterwards.
unsafe impl Send for Vectors {}

/// Reads into `buffers`, and behind them into `spill`. Of a long list of buffers, only the first ones are used.
/// Returns how many bytes were read, and how many of the buffers' bytes could be.
pub(super) fn read(
    from: BorrowedFd<'_>,
    buffers: &Buffers,
    spill: &mut [u8],
    scratch: &mut Vectors,
) -> io::Result<(usize, usize)> {
    let all = buffers.vectors();
    let used = &all[..all.len().min(MOST_VECTORS - 1)];
    let direct = if used.len() == all.len() {
        buffers.len()
    } else {
        used.iter().map(|vector| vector.iov_len).sum()
    };
    let list = &mut scratch.0;
    list.clear();
    list.extend_from_slice(used);
    list.push(libc::iovec {
        iov_base: spill.as_mut_ptr().cast(),
        iov_len: spill.len(),
    });
    // SAFETY: the buffers are valid for as long as `buffers` is borrowed, `spill` is a slice, and there are few enough.
    let count = retry(|| unsafe {
        libc::readv(from.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int)
    })?;
    Ok((count, direct))
}

/// Writes `buffers` at once.
pub(super) fn write(to: BorrowedFd<'_>, buffers: &Buffers) -> io::Result<usize> {
    let copy;
    let mut one = libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    };
    let mut list = buffers.vectors();
    if list.len() > MOST_VECTORS {
        copy = gather(buffers);
        one.iov_base = copy.as_ptr().cast_mut().cast();
        one.iov_len = copy.len();
        list = std::slice::from_ref(&one);
    }
    // SAFETY: the buffers, or their copy, are valid for the time of the call, and only read; there are few enough.
    retry(|| unsafe { libc::writev(to.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int) })
}

/// Sends `prefix` and then `buffers` without their first `skip` bytes through a stream socket, as much as there is room for.
pub(super) fn send(
    to: BorrowedFd<'_>,
    prefix: &[u8],
    buffers: &Buffers,
    mut skip: usize,
    scratch: &mut Vectors,
) -> io::Result<usize> {
    let list = &mut scratch.0;
    list.clear();
    list.push(libc::iovec {
        iov_base: prefix.as_ptr().cast_mut().cast(),
        iov_len: prefix.len(),
    });
    for vector in buffers.vectors() {
        if skip >= vector.iov_len {
            skip -= vector.iov_len;
            continue;
        }
        list.push(libc::iovec {
            // SAFETY: `skip` is less than the buffer's length.
            iov_base: unsafe { vector.iov_base.byte_add(skip) },
            iov_len: vector.iov_len - skip,
        });
        skip = 0;
        if list.len() == MOST_VECTORS {
            break;
        }
    }
    // SAFETY: a message header of zeros has nothing in it.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_mut_ptr();
    message.msg_iovlen = list.len();
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the message has a list of buffers that are valid for the time of the call, and only read.
    retry(|| unsafe { libc::sendmsg(to.as_raw_fd(), &raw const message, flags) })
}

/// Calls until no signal interrupts it. Whoever is told of data only when it comes must not take a signal for its end.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn gather(buffers: &Buffers) -> Vec<u8> {
    let mut bytes = vec![0; buffers.len()];
    buffers.read_at(0, &mut bytes);
    bytes
}
