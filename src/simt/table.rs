//! The kernels compiled as C++, by name.

use std::ffi::c_void;

use super::machine::{self, Buffer};
use crate::device::kernel::with_kernels;
use crate::params::*;
use crate::plan::LaunchShape;

macro_rules! simulator {
    ($($variant:ident($params:ident) {
        $($threads:ident $blocks:ident $shrinks:ident: $($name:ident)+;)+
    })+) => {
        /// Runs a kernel by its name.
        ///
        /// # Errors
        /// If the kernel does something wrong, which the message says, or there is no such kernel.
        ///
        /// # Safety
        /// `parameters` is the kernel's parameter block.
        pub unsafe fn simulate(
            kernel: &str,
            shape: LaunchShape,
            seed: u64,
            parameters: *const c_void,
            buffers: &mut [Buffer],
        ) -> Result<(), String> {
            unsafe extern "C" {
                $($($(fn $name(parameters: &$params);)+)+)+
            }
            match kernel {
                $($($(
                    // SAFETY: the caller vouches for the block.
                    stringify!($name) => unsafe {
                        let parameters = &*parameters.cast::<$params>();
                        machine::run(stringify!($name), shape, seed, $name, parameters, buffers)
                    },
                )+)+)+
                _ => Err(format!("there is no kernel {kernel}")),
            }
        }
    };
}
with_kernels!(simulator);
