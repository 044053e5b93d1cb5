use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute,
    CUlaunchAttributeID as LaunchAttribute,
};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, DriverError,
};
use cudarc::nvrtc::Ptx;

use super::driver;
use crate::device::kernel::{KERNELS, Launch};
use crate::params::{ATKD_PIPELINED_THREADS, ATKD_PIPELINED_WIDE_THREADS};
use crate::plan::{DeviceProperties, Plan, Preference, Problem};
use crate::{Error, Result};

/// Machine code for several architectures, and PTX; empty if there was no nvcc.
const FAT_BINARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/atkd.fatbin"));

/// Events before the first kernel of a call, and after each, with its name.
pub(super) type Clock = Vec<(&'static str, CudaEvent)>;

fn tick(stream: &Arc<CudaStream>) -> Result<CudaEvent> {
    let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
    stream.record_event(Some(flags)).map_err(driver("taking times"))
}

/// The kernels, loaded into a context.
#[derive(Debug)]
pub struct Kernels {
    context: Arc<CudaContext>,
    functions: HashMap<&'static str, CudaFunction>,
    device: DeviceProperties,
    preferred: Option<Preference>,
    /// A kernel may be made ready while the one before it runs.
    overlap: bool,
    /// The address of a word that keeps the threshold of a call whose workspace is not kept, for the next to predict by: any value
    /// is right.
    pub(super) kept_threshold: u64,
    /// The owner of that word.
    _memory: CudaSlice<u32>,
}

impl Kernels {
    /// The architectures whose machine code is in this build, as in `80` for sm_80; none if it was built
    /// without nvcc.
    pub fn architectures() -> impl Iterator<Item = &'static str> {
        let listed = if FAT_BINARY.is_empty() { "" } else { env!("ATKD_ARCHITECTURES") };
        listed.split_whitespace()
    }

    /// Why this build has no kernels, and how to get one that has; `None` if it has them. Cargo shows the build
    /// script's warning only to those who build from a clone.
    pub fn missing() -> Option<&'static str> {
        FAT_BINARY.is_empty().then_some(env!("ATKD_NO_KERNELS"))
    }

    /// Loads the kernels; takes tens of milliseconds, once a context.
    ///
    /// # Errors
    /// If this build has no kernels, or none that run on the device.
    pub fn load(context: &Arc<CudaContext>) -> Result<Arc<Self>> {
        Self::load_preferring(context, None)
    }

    /// Does what [`load`](Self::load) does, with a kernel for rows that is not the plan's choice.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_preferring(
        context: &Arc<CudaContext>,
        preferred: Option<Preference>,
    ) -> Result<Arc<Self>> {
        if let Some(hint) = Self::missing() {
            return Err(Error::NoKernels { hint });
        }
        let attribute =
            |attribute| context.attribute(attribute).map_err(driver("asking the device"));
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < (8, 0) {
            return Err(Error::OldDevice { major: capability.0, minor: capability.1 });
        }
        let module = context
            .load_module(Ptx::from_binary(FAT_BINARY.to_vec()))
            .map_err(driver("loading the kernels"))?;
        let functions: HashMap<_, CudaFunction> = KERNELS
            .iter()
            .map(|kernel| {
                let function = module.load_function(kernel.name);
                Ok((kernel.name, function.map_err(driver("finding a kernel"))?))
            })
            .collect::<Result<_>>()?;
        // A device may run PTX of an older architecture, whose kernels know of no clusters.
        let compiled_for =
            functions["select_hard"].ptx_version().map_err(driver("asking for a kernel"))?;
        let mut device = DeviceProperties {
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            shared_bytes: attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
            )? as usize,
            pipelined_blocks: 0,
            pipelined_wide_blocks: 0,
        };
        let most = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        for kernel in KERNELS.iter().filter(|kernel| kernel.name.starts_with("row_sparse")) {
            allow_shared(&functions[kernel.name], most, kernel.threads)
                .map_err(driver("preparing a kernel"))?;
        }
        if capability >= (9, 0) && compiled_for >= 90 {
            // By threads, of which wide kernels have twice as many.
            let blocks_of = |threads| {
                let kernels = KERNELS.iter().filter(|kernel| {
                    kernel.name.starts_with("row_pipelined") && kernel.threads == threads
                });
                kernels.map(|kernel| kernel.name).try_fold(u32::MAX, |least, kernel| {
                    let blocks = allow_shared(&functions[kernel], most, threads)
                        .map_err(driver("preparing a kernel"))?;
                    Ok(least.min(blocks))
                })
            };
            device.pipelined_blocks = blocks_of(ATKD_PIPELINED_THREADS)?;
            device.pipelined_wide_blocks = blocks_of(ATKD_PIPELINED_WIDE_THREADS)?;
        }
        let mut driver_version = 0;
        // SAFETY: writes one number.
        unsafe { sys::cuDriverGetVersion(&mut driver_version) }
            .result()
            .map_err(driver("asking for the driver's version"))?;
        // Before 12.3 such launches cannot be captured.
        let overlap = device.pipelined_blocks > 0 && driver_version >= 12030;
        // Other streams use it, without an event to wait for.
        let stream = context.default_stream();
        let memory = stream.alloc_zeros(1).map_err(driver("allocating a word"))?;
        let (kept_threshold, _) = memory.device_ptr(&stream);
        stream.synchronize().map_err(driver("allocating a word"))?;
        Ok(Arc::new(Self {
            context: context.clone(),
            functions,
            device,
            preferred,
            overlap,
            kept_threshold,
            _memory: memory,
        }))
    }

    /// The context that they were loaded into.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The device that plans are made for.
    pub fn device(&self) -> DeviceProperties {
        self.device
    }

    /// The kernel for rows that is not the plan's choice.
    pub(super) fn preferred(&self) -> Option<Preference> {
        self.preferred
    }

    /// How a call is cut into blocks.
    pub fn plan(&self, problem: &Problem) -> Plan {
        Plan::new(&self.device, problem, self.preferred)
    }

    /// Enqueues kernels, in order. Takes the time before the first and after each if there is a clock: a kernel's name
    /// and an event.
    ///
    /// # Safety
    /// The addresses in the launches' parameters are of device memory of the sizes that go with them,
    /// which stays until the stream is done with it.
    pub(super) unsafe fn enqueue(
        &self,
        stream: &Arc<CudaStream>,
        launches: impl IntoIterator<Item = Launch>,
        mut clock: Option<&mut Clock>,
    ) -> Result<()> {
        if let Some(clock) = &mut clock {
            clock.clear();
            clock.push(("", tick(stream)?));
        }
        let mut after = false;
        for launch in launches {
            // SAFETY: the caller's.
            unsafe { self.launch(stream, &launch, after)? };
            after = launch.shape.team == 1 && clock.is_none();
            if let Some(clock) = &mut clock {
                clock.push((launch.kernel, tick(stream)?));
            }
        }
        Ok(())
    }

    /// `after`: the stream's last work is a kernel of the same call, beside which this one may be made ready,
    /// but for kernels in teams.
    /// Every kernel begins by waiting for what is before it.
    ///
    /// # Safety
    /// As [`enqueue`](Self::enqueue).
    unsafe fn launch(&self, stream: &CudaStream, launch: &Launch, after: bool) -> Result<()> {
        // SAFETY: plain numbers.
        let mut overlap: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        overlap.id = LaunchAttribute::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        overlap.value.programmaticStreamSerializationAllowed = 1;
        let mut attributes = [overlap; 2];
        let in_teams = launch.shape.team > 1;
        let mut count = usize::from(after && self.overlap && !in_teams);
        if launch.shape.cluster > 1 {
            attributes[count] = cluster_of(launch.shape.cluster);
            count += 1;
        }
        if in_teams {
            attributes[count].id = LaunchAttribute::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
            attributes[count].value.cooperative = 1;
            count += 1;
        }
        let config = sys::CUlaunchConfig {
            gridDimX: launch.shape.grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: launch.shape.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shape.shared,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        let mut parameters = [launch.parameters.as_ptr().cast_mut()];
        let parameters: *mut *mut c_void = parameters.as_mut_ptr();
        let function = self.functions[launch.kernel].cu_function();
        // SAFETY: the driver copies the parameter block before it returns; the kernel takes this one.
        unsafe { sys::cuLaunchKernelEx(&config, function, parameters, std::ptr::null_mut()) }
            .result()
            .map_err(driver("launching a kernel"))
    }
}

fn cluster_of(blocks: u32) -> sys::CUlaunchAttribute {
    // SAFETY: plain numbers.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = LaunchAttribute::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim.x = blocks;
    attribute.value.clusterDim.y = 1;
    attribute.value.clusterDim.z = 1;
    attribute
}

/// All the shared memory that a block of a kernel can have, in place of the L1 cache. Returns how many such blocks a
/// multiprocessor has beside their shared memory, one at least.
fn allow_shared(
    function: &CudaFunction,
    block_shared_bytes: i32,
    threads: u32,
) -> std::result::Result<u32, DriverError> {
    let dynamic = block_shared_bytes - function.shared_size_bytes()?;
    for (attribute, value) in [
        (FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic),
        (FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ] {
        function.set_attribute(attribute, value)?;
    }
    Ok(function.occupancy_max_active_blocks_per_multiprocessor(threads, 0, None)?.max(1))
}
