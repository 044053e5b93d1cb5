//! Large pages for a large gradient: its memory is often fresh from the system, which then maps and clears
//! it page by page as it is written, in more time than the loss takes.

/// Asks for large pages where `bytes` from `address` span any. Only advice: nothing happens where there are
/// none.
#[cfg(target_os = "linux")]
pub fn advise_huge(address: u64, bytes: usize) {
    const HUGE: usize = 2 << 20;
    let address = address as usize;
    let start = address.next_multiple_of(HUGE);
    let end = (address + bytes) / HUGE * HUGE;
    if start < end {
        // SAFETY: changes no content, only how the kernel backs the memory.
        unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
pub fn advise_huge(_: u64, _: usize) {}
