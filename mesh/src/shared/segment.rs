//! The memory itself. The other process may write into it at any time whatever it likes, so
//! nothing of it is ever borrowed but counters, which are atomic: bytes are copied in and out, and what
//! they mean is judged in the copy. It cannot become shorter, which a seal sees to, so that touching it never fails.
//! The only unsafe code of this crate: the two copies, and the counters.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;

use bytes::BufMut;
use memmap2::{MmapOptions, MmapRaw};
use proto::MAX_MESSAGE_BYTES;

use super::rings;

/// The rings and two of the largest messages. Memory is taken when it is first written, lowest places first.
const BYTES: usize = rings::BOTH + 2 * MAX_MESSAGE_BYTES;
/// The most that is taken from anybody.
const MOST: u64 = 1 << 30;

/// See the module's text. Lives as long as somebody of this process uses it.
pub struct Segment {
    map: MmapRaw,
    file: File,
}

impl Segment {
    /// A new one, and what to hand over.
    ///
    /// # Errors
    /// The system has no such memory.
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let segment = Self::map(File::from(sealed(BYTES as u64)?), BYTES)?;
        let handed = segment.file.try_clone()?.into();
        Ok((segment, handed))
    }

    /// What was handed over.
    ///
    /// # Errors
    /// It could become shorter, or is too long.
    pub fn adopt(handed: OwnedFd) -> io::Result<Self> {
        let file = File::from(handed);
        check_seals(&file)?;
        match file.metadata()?.len() {
            bytes @ 1..=MOST => Self::map(file, bytes as usize),
            bytes => Err(io::Error::other(format!("{bytes} bytes of shared memory"))),
        }
    }

    fn map(file: File, bytes: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(bytes).map_raw(&file)?;
        Ok(Self { map, file })
    }

    pub fn size(&self) -> usize {
        self.map.len()
    }

    /// Has the system give memory for `bytes` bytes from `at`, which it would otherwise do when they
    /// are touched, and end the process if there is none.
    ///
    /// # Errors
    /// There is none.
    pub fn back(&self, at: usize, bytes: usize) -> io::Result<()> {
        back(&self.file, at as u64, bytes as u64)
    }

    /// Writes `bytes` at `at`. The caller has checked that they lie within.
    #[allow(unsafe_code)]
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let to = self.within(at, bytes.len());
        // SAFETY: as many bytes of the mapping begin at `to`, and are there as long as `self`, since
        // the file is sealed. `bytes` is a borrow, and nobody borrows of the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Appends `bytes` bytes from `at`. The caller has checked that they lie within.
    #[allow(unsafe_code)]
    pub fn read(&self, at: usize, mut bytes: usize, into: &mut impl BufMut) {
        let mut from = self.within(at, bytes);
        while bytes > 0 {
            let room = into.chunk_mut();
            let some = bytes.min(room.len());
            // SAFETY: as for `write`; `room` has `some` bytes, and is written before `advance_mut`
            // counts them. What another process writes meanwhile makes bytes of the copy old or
            // new; every value of a byte is one.
            unsafe {
                std::ptr::copy_nonoverlapping(from, room.as_mut_ptr(), some);
                into.advance_mut(some);
            }
            (from, bytes) = (from.wrapping_add(some), bytes - some);
        }
    }

    /// A count at `at`, a multiple of 8, that both processes read and write. The caller has checked
    /// that it lies within.
    #[allow(unsafe_code)]
    pub fn counter(&self, at: usize) -> &AtomicU64 {
        let at = self.within(at, size_of::<AtomicU64>()).cast::<AtomicU64>();
        assert!(at.is_aligned(), "whoever asks has checked");
        // SAFETY: as for `write`, and aligned. It is only ever touched as an atomic, whoever writes, and
        // every value of its bytes is one.
        unsafe { &*at }
    }

    fn within(&self, at: usize, bytes: usize) -> *mut u8 {
        let end = at.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.size()), "whoever asks has checked");
        self.map.as_mut_ptr().wrapping_add(at)
    }
}

#[cfg(target_os = "linux")]
fn sealed(bytes: u64) -> io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let file = memfd_create("moemesh-rows", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Nothing but ordinary memory with the seal passes: files have none, and where huge pages are
/// used up, touching memory of such ends the process.
#[cfg(target_os = "linux")]
fn check_seals(file: &File) -> io::Result<()> {
    use rustix::fs::{SealFlags, fcntl_get_seals, fstatfs};
    // TMPFS_MAGIC of linux/magic.h.
    const ORDINARY: i64 = 0x0102_1994;
    let sealed = fcntl_get_seals(file)?.contains(SealFlags::SHRINK);
    match sealed && fstatfs(file)?.f_type == ORDINARY {
        true => Ok(()),
        false => Err(io::Error::other("shared memory that could become shorter, or of huge pages")),
    }
}

#[cfg(target_os = "linux")]
fn back(file: &File, at: u64, bytes: u64) -> io::Result<()> {
    Ok(rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), at, bytes)?)
}

#[cfg(not(target_os = "linux"))]
fn sealed(_: u64) -> io::Result<OwnedFd> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
fn check_seals(_: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
fn back(_: &File, _: u64, _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    #[test]
    fn what_one_writes_the_other_reads_and_nobody_makes_it_shorter() {
        let (one, handed) = Segment::create().unwrap();
        let again = handed.try_clone().unwrap();
        let other = Segment::adopt(handed).unwrap();
        let last = BYTES - 3;
        one.write(last, &[1, 2, 3]);
        let mut read = vec![0];
        other.read(last, 3, &mut read);
        assert_eq!((read, other.size()), (vec![0, 1, 2, 3], BYTES));
        assert!(ftruncate(&again, 0).is_err() && one.back(0, BYTES).is_ok());
    }

    #[test]
    fn nothing_else_is_adopted() {
        let memory = |flags, bytes| {
            let file = memfd_create("moemesh-test", flags).unwrap();
            ftruncate(&file, bytes).unwrap();
            file
        };
        assert!(Segment::adopt(memory(MemfdFlags::CLOEXEC, 4096)).is_err());
        assert!(Segment::adopt(memory(MemfdFlags::ALLOW_SEALING, 4096)).is_err());
        let huge = MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        if let Ok(huge) = memfd_create("moemesh-test", huge) {
            fcntl_add_seals(&huge, SealFlags::SHRINK).unwrap();
            assert!(Segment::adopt(huge).is_err(), "huge pages");
        }
        for bytes in [0, MOST + 1] {
            assert!(Segment::adopt(sealed(bytes).unwrap()).is_err(), "{bytes}");
        }
        assert!(Segment::adopt(File::open("/dev/null").unwrap().into()).is_err());
    }

    #[test]
    #[should_panic(expected = "has checked")]
    fn places_beyond_the_end_are_not_touched() {
        let (segment, _) = Segment::create().unwrap();
        segment.read(BYTES - 1, 2, &mut Vec::new());
    }
}
