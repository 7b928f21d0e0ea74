//! Kernel launches whose arguments have types and roles.
//!
//! A kernel is declared once, in one line of [`kernels!`] in `kernels.rs`. The declaration becomes a function that
//! launches the kernel, and an entry of [`declarations`](super::kernels::declarations), which a test compares with the
//! kernel's signature in `kernels/*.cu`. The types keep arguments in their places: an [`In`] is no [`Out`], and a `u32`
//! is no `usize`. They do not bound what a kernel reads and writes: the launchers in `ops/` check shapes first.

use std::marker::PhantomData;

use half::{bf16, f16};

use super::gpu::{Address, Arg, Kernel};
use crate::backend::Dtype;

/// A type that a kernel's pointer points to.
pub trait Element {
    /// What is known of the type at run time only: nothing, except for [`Any`].
    type Format: Copy;

    /// Bytes of an element.
    fn size(format: Self::Format) -> usize;

    /// The number format, if it is known at run time only.
    fn dtype(_: Self::Format) -> Option<Dtype> {
        None
    }
}

/// Elements whose number format is known at run time: that of a tensor or a weight.
pub enum Any {}

impl Element for Any {
    type Format = Dtype;

    fn size(format: Dtype) -> usize {
        format.size()
    }

    fn dtype(format: Dtype) -> Option<Dtype> {
        Some(format)
    }
}

/// Addresses of arrays that a kernel reads.
pub struct Addresses<T>(PhantomData<T>);

impl<T: Element> Element for Addresses<T> {
    type Format = T::Format;

    fn size(_: T::Format) -> usize {
        size_of::<u64>()
    }

    fn dtype(format: T::Format) -> Option<Dtype> {
        T::dtype(format)
    }
}

/// Addresses of arrays that a kernel overwrites.
pub struct Targets<T>(PhantomData<T>);

impl<T: Element> Element for Targets<T> {
    type Format = T::Format;

    fn size(_: T::Format) -> usize {
        size_of::<u64>()
    }

    fn dtype(format: T::Format) -> Option<Dtype> {
        T::dtype(format)
    }
}

/// A type of the kernels: its name there.
pub trait Named {
    /// As in `kernels/*.cu`.
    fn name() -> String;
}

impl<T: Named> Named for Addresses<T> {
    fn name() -> String {
        format!("const {}*", T::name())
    }
}

impl<T: Named> Named for Targets<T> {
    fn name() -> String {
        format!("{}*", T::name())
    }
}

/// An element type that has a [`Dtype`].
pub trait Number: Element<Format = ()> {
    /// Its number format.
    const DTYPE: Dtype;
}

macro_rules! types {
    ($($type:ty as $name:literal $(= $dtype:ident)?),*) => {$(
        impl Element for $type {
            type Format = ();

            fn size((): ()) -> usize {
                size_of::<$type>()
            }
        }

        impl Named for $type {
            fn name() -> String {
                $name.into()
            }
        }

        $(impl Number for $type {
            const DTYPE: Dtype = Dtype::$dtype;
        })?
    )*};
}

types!(f32 as "float" = F32, bf16 as "bf16" = Bf16, f16 as "f16" = F16);
types!(f64 as "double", u32 as "u32", u64 as "u64", u8 as "unsigned char");

/// What a kernel does with the memory behind a pointer.
pub trait Role {
    /// Whether the kernel declares the pointer as one to `const`.
    const CONST: bool;
}

/// Marks a read-only pointer.
pub enum Reads {}
/// It writes, and never reads what was there before.
pub enum Writes {}
/// It reads and writes.
pub enum Updates {}

impl Role for Reads {
    const CONST: bool = true;
}
impl Role for Writes {
    const CONST: bool = false;
}
impl Role for Updates {
    const CONST: bool = false;
}

/// A pointer argument of a kernel. It borrows the memory until the launch is queued; from then on the order of the
/// stream protects it.
pub struct Pointer<'a, R, T: Element> {
    at: Address,
    format: T::Format,
    borrowed: PhantomData<(&'a (), R)>,
}

/// `const T*`: read only.
pub type In<'a, T> = Pointer<'a, Reads, T>;
/// `T*`: overwritten.
pub type Out<'a, T> = Pointer<'a, Writes, T>;
/// `T*`: read and overwritten.
pub type InOut<'a, T> = Pointer<'a, Updates, T>;

impl<T: Element> Clone for In<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element> Copy for In<'_, T> {}

impl<R, T: Element> Pointer<'_, R, T> {
    /// A pointer to elements of type `T` at this address, in memory that its owner keeps alive for `'a`.
    pub(super) fn new(at: Address, format: T::Format) -> Self {
        Self { at, format, borrowed: PhantomData }
    }

    /// The element `n` elements further on.
    pub(super) fn skip(self, n: usize) -> Self {
        Self { at: self.at.offset(n * T::size(self.format)), ..self }
    }

    pub(super) fn address(&self) -> Address {
        self.at
    }
}

impl<'a, R> Pointer<'a, R, Any> {
    /// Panics unless the elements are of type `T`.
    #[track_caller]
    pub(super) fn of<T: Number>(self) -> Pointer<'a, R, T> {
        assert!(self.format == T::DTYPE, "{:?} where a kernel takes {:?}", self.format, T::DTYPE);
        Pointer::new(self.at, ())
    }

    /// The same memory as bytes.
    pub(super) fn bytes(self) -> Pointer<'a, R, u8> {
        Pointer::new(self.at, ())
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.format
    }
}

impl<'a, R, T: Number> Pointer<'a, R, T> {
    /// The same elements, their type no longer part of the pointer's.
    pub(super) fn any(self) -> Pointer<'a, R, Any> {
        Pointer::new(self.at, T::DTYPE)
    }
}

impl<'a> In<'a, u64> {
    /// The numbers as addresses of elements of type `dtype`.
    pub(super) fn addresses(self, dtype: Dtype) -> In<'a, Addresses<Any>> {
        Pointer::new(self.at, dtype)
    }

    /// The numbers as addresses of elements of type `dtype` that a kernel overwrites. The caller has borrowed them for that.
    pub(super) fn targets(self, dtype: Dtype) -> In<'a, Targets<Any>> {
        Pointer::new(self.at, dtype)
    }
}

/// A pointer that may be null, for "not given".
pub struct OrNull<P>(P);

impl<R, T: Element> OrNull<Pointer<'_, R, T>> {
    /// A null pointer.
    pub(super) fn null(format: T::Format) -> Self {
        Self(Pointer::new(Address::NULL, format))
    }
}

impl<P> From<P> for OrNull<P> {
    fn from(pointer: P) -> Self {
        Self(pointer)
    }
}

/// An argument of a kernel.
pub(super) trait Argument {
    fn arg(&self) -> Arg;

    /// The number format of elements that is known at run time only.
    fn dtype(&self) -> Option<Dtype> {
        None
    }
}

impl<R, T: Element> Argument for Pointer<'_, R, T> {
    fn arg(&self) -> Arg {
        Arg::Pointer(self.at)
    }

    fn dtype(&self) -> Option<Dtype> {
        T::dtype(self.format)
    }
}

impl<P: Argument> Argument for OrNull<P> {
    fn arg(&self) -> Arg {
        self.0.arg()
    }

    fn dtype(&self) -> Option<Dtype> {
        self.0.dtype()
    }
}

/// A parameter's type, as the kernel declares it.
pub(super) trait Declared {
    fn declared() -> String;
}

impl<R: Role, T: Element + Named> Declared for Pointer<'_, R, T> {
    fn declared() -> String {
        let element = T::name();
        match R::CONST {
            true if element.ends_with('*') => format!("{element} const*"),
            true => format!("const {element}*"),
            false => format!("{element}*"),
        }
    }
}

impl<P: Declared> Declared for OrNull<P> {
    fn declared() -> String {
        P::declared()
    }
}

macro_rules! scalars {
    ($($type:ty as $name:literal = $arg:expr),*) => {$(
        impl Argument for $type {
            fn arg(&self) -> Arg {
                let arg: fn($type) -> Arg = $arg;
                arg(*self)
            }
        }

        impl Declared for $type {
            fn declared() -> String {
                $name.into()
            }
        }
    )*};
}

scalars!(usize as "u64" = |x| Arg::U64(x as u64), u64 as "u64" = Arg::U64, u32 as "u32" = Arg::U32);
scalars!(f32 as "float" = Arg::F32, bool as "int" = |x| Arg::I32(x.into()));

/// A kernel's signature, as this program believes it to be.
#[derive(Debug, Clone)]
pub struct Declaration {
    /// The kernel.
    pub kernel: Kernel,
    /// Name and C++ type of each parameter, such as `("x", "const float*")`.
    pub parameters: Vec<(&'static str, String)>,
}

/// The kernel for the number format of the arguments, `dtypes`. Panics if the arguments have different formats, or if no
/// kernel exists for it.
pub(super) fn select(name: &str, dtypes: &[Option<Dtype>], kernels: &'static [(Dtype, Kernel)]) -> &'static Kernel {
    let mut dtypes = dtypes.iter().flatten();
    let &dtype = dtypes.next().expect("an argument that has the kernel's number format");
    assert!(dtypes.all(|other| *other == dtype), "arguments of {name} in different number formats");
    let kernel = kernels.iter().find(|(of, _)| *of == dtype);
    kernel.map_or_else(|| panic!("there is no kernel {name} for {dtype:?}"), |(_, kernel)| kernel)
}

/// Declares kernels by their module and their parameters, in order and with the names in `kernels/*.cu`:
///
/// - `fn name(..) in MODULE;` is the kernel `name`.
/// - `fn name<T>(..) in MODULE;` is the pair `name_f32`, `name_bf16`; the arguments' number format selects one.
/// - `fn name<T>(..) in { form: Form, pattern => MODULE { "_suffix": type, .. }, .. };` is a kernel with several
///   implementations; `form` selects the module.
///
/// Several kernels in one place are separated by commas.
macro_rules! kernels {
    ($($(fn $name:ident $(<$t:ident>)? ($($parameters:tt)*)),+ in $place:tt;)*) => {
        $($($crate::backend::cuda::launch::kernel!($name $(<$t>)? ($($parameters)*) $place);)+)*

        /// The signatures of all kernels.
        pub fn declarations() -> Vec<Declaration> {
            [$($($name::declarations()),+),*].concat()
        }
    };
}

/// One of [`kernels!`].
macro_rules! kernel {
    ($name:ident ($($arg:ident: $type:ty),* $(,)?) $module:ident) => {
        pub(in crate::backend::cuda) mod $name {
            use super::*;

            static KERNEL: Kernel = Kernel { module: &$module, name: stringify!($name) };

            #[allow(clippy::too_many_arguments)]
            pub(in crate::backend::cuda) fn launch(cuda: &Cuda, grid: Grid, $($arg: $type),*) {
                // SAFETY: these are the kernel's parameters, which a test compares with its source. Only this backend can
                // call this function, and its operations check the lengths of what they pass.
                unsafe { cuda.launch(&KERNEL, grid, &[$(Argument::arg(&$arg)),*]) }
            }

            pub(super) fn declarations() -> Vec<Declaration> {
                vec![Declaration { kernel: KERNEL, parameters: vec![$((stringify!($arg), <$type as Declared>::declared())),*] }]
            }
        }
        pub(in crate::backend::cuda) use $name::launch as $name;
    };
    ($name:ident <$t:ident> ($($arg:ident: $type:ty),* $(,)?) $module:ident) => {
        pub(in crate::backend::cuda) mod $name {
            use super::*;

            static KERNELS: [(Dtype, Kernel); 2] = [
                (Dtype::F32, Kernel { module: &$module, name: concat!(stringify!($name), "_f32") }),
                (Dtype::Bf16, Kernel { module: &$module, name: concat!(stringify!($name), "_bf16") }),
            ];

            #[allow(clippy::too_many_arguments)]
            pub(in crate::backend::cuda) fn launch<$t: Element<Format = Dtype>>(cuda: &Cuda, grid: Grid, $($arg: $type),*) {
                let kernel = select(stringify!($name), &[$(Argument::dtype(&$arg)),*], &KERNELS);
                // SAFETY: these are the kernel's parameters, which a test compares with its source. Only this backend can
                // call this function, and its operations check the lengths of what they pass.
                unsafe { cuda.launch(kernel, grid, &[$(Argument::arg(&$arg)),*]) }
            }

            fn parameters<$t: Element + Named>() -> Vec<(&'static str, String)> {
                vec![$((stringify!($arg), <$type as Declared>::declared())),*]
            }

            pub(super) fn declarations() -> Vec<Declaration> {
                vec![
                    Declaration { kernel: KERNELS[0].1, parameters: parameters::<f32>() },
                    Declaration { kernel: KERNELS[1].1, parameters: parameters::<bf16>() },
                ]
            }
        }
        pub(in crate::backend::cuda) use $name::launch as $name;
    };
    ($name:ident <$t:ident> ($($arg:ident: $type:ty),* $(,)?) {
        form: $form:ty, $($pattern:pat => $module:ident { $($suffix:literal: $number:ty),* }),* $(,)?
    }) => {
        pub(in crate::backend::cuda) mod $name {
            use super::*;

            #[allow(clippy::too_many_arguments)]
            pub(in crate::backend::cuda) fn launch<$t: Element<Format = Dtype>>(cuda: &Cuda, form: $form, grid: Grid, $($arg: $type),*) {
                let kernels: &'static [(Dtype, Kernel)] = match form {
                    $($pattern => const { &[$((
                        <$number as Number>::DTYPE,
                        Kernel { module: &$module, name: concat!(stringify!($name), $suffix) },
                    )),*] },)*
                    other => panic!("there is no kernel {} for {other:?}", stringify!($name)),
                };
                let kernel = select(stringify!($name), &[$(Argument::dtype(&$arg)),*], kernels);
                // SAFETY: these are the kernel's parameters, which a test compares with its source. Only this backend can
                // call this function, and its operations check the lengths of what they pass.
                unsafe { cuda.launch(kernel, grid, &[$(Argument::arg(&$arg)),*]) }
            }

            fn parameters<$t: Element + Named>() -> Vec<(&'static str, String)> {
                vec![$((stringify!($arg), <$type as Declared>::declared())),*]
            }

            pub(super) fn declarations() -> Vec<Declaration> {
                vec![$($(Declaration {
                    kernel: Kernel { module: &$module, name: concat!(stringify!($name), $suffix) },
                    parameters: parameters::<$number>(),
                }),*),*]
            }
        }
        pub(in crate::backend::cuda) use $name::launch as $name;
    };
}

pub(super) use {kernel, kernels};
