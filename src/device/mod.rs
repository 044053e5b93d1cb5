//! A call as the kernels that it launches, in order: the same on a GPU and in the simulator.

pub(crate) mod kernel;
pub(crate) mod session;
pub(crate) mod shards;
pub(crate) mod sparse;
pub(crate) mod stages;
pub(crate) mod workspace;
