//! Stubs.
use std::ffi::c_void;

macro_rules! stubs {
    ($($name:ident($($argument:ident: $type:ty),*);)+) => {
        $(#[unsafe(no_mangle)] extern "C" fn $name($($argument: $type),*) {
            unimplemented!("{:?}", ($($argument,)*));
        })+
    };
}
stubs! {
    simt_load_staged(offset: u32, to: *mut c_void);
    simt_store_staged(offset: u32, from: *const c_void);
    simt_init_barrier(barrier: *mut c_void, arrivals: u32);
    simt_arrive(barrier: *mut c_void, bytes: u32);
    simt_wait_for(barrier: *mut c_void, parity: u32, line: u32);
    simt_bulk_load(offset: u32, from: *const c_void, bytes: u32, barrier: *mut c_void);
    simt_bulk_store(to: *mut c_void, offset: u32, bytes: u32);
    simt_commit_bulk_stores();
    simt_wait_bulk_stores(written: bool);
    simt_fence_bulk();
}
