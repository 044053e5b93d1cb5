//! How an error reaches C: a code, and a message that its thread keeps.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// One of the codes below.
pub type AtkdStatus = i32;

/// Done.
pub const ATKD_OK: AtkdStatus = 0;
/// An argument is wrong; the message says which, with its numbers.
pub const ATKD_INVALID_ARGUMENT: AtkdStatus = 1;
/// This build, or this machine, cannot do it.
pub const ATKD_NOT_SUPPORTED: AtkdStatus = 2;
/// The CUDA driver reported an error.
pub const ATKD_CUDA_ERROR: AtkdStatus = 3;
/// A bug in the library. What was written is undefined, the library remains usable.
pub const ATKD_PANIC: AtkdStatus = 4;

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct Failure {
    status: AtkdStatus,
    message: String,
}

impl Failure {
    pub(crate) fn new(status: AtkdStatus, message: String) -> Self {
        Self { status, message }
    }

    pub(crate) fn null(name: &'static str) -> Self {
        Self::new(ATKD_INVALID_ARGUMENT, format!("{name} is a null pointer"))
    }

    pub(crate) fn value(name: &'static str, value: impl Display, allowed: &'static str) -> Self {
        Self::new(ATKD_INVALID_ARGUMENT, format!("{name} is {value}, but must be {allowed}"))
    }
}

impl From<atkd::Error> for Failure {
    fn from(error: atkd::Error) -> Self {
        use atkd::Error::*;
        let status = match &error {
            NoDriver | NoKernels { .. } | OldDevice { .. } | NoUniformTail => ATKD_NOT_SUPPORTED,
            Driver { .. } | FailedCall => ATKD_CUDA_ERROR,
            _ => ATKD_INVALID_ARGUMENT,
        };
        Self::new(status, error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

pub(crate) fn last_message() -> *const c_char {
    // None while the thread ends.
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs `work`, keeps the message of its failure, and lets no panic out.
pub(crate) fn guard(work: impl FnOnce() -> Result<(), Failure>) -> AtkdStatus {
    let failure = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return ATKD_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().copied();
            let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
            let text = text.unwrap_or("no message");
            Failure::new(ATKD_PANIC, format!("a bug in atkd, please report it: {text}"))
        }
    };
    let message = CString::new(failure.message.replace('\0', "")).unwrap_or_default();
    let _ = LAST.try_with(|last| last.replace(message));
    failure.status
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    fn no_panic_gets_out() {
        assert_eq!(guard(|| panic!("row {}", 7)), ATKD_PANIC);
        // SAFETY: this thread makes no other call meanwhile.
        let message = unsafe { CStr::from_ptr(last_message()) };
        assert!(message.to_str().unwrap().ends_with("row 7"), "{message:?}");
        assert_eq!(guard(|| Ok(())), ATKD_OK);
    }

    #[test]
    fn each_thread_has_its_own_message() {
        assert_eq!(guard(|| Err(Failure::null("here"))), ATKD_INVALID_ARGUMENT);
        let there = std::thread::spawn(|| {
            // SAFETY: as above.
            unsafe { CStr::from_ptr(last_message()) }.to_owned()
        });
        assert_eq!(there.join().unwrap(), CString::default());
    }
}
