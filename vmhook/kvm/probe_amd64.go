package kvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests and layouts of the KVM API, version 12, for x86-64. Source:
// Documentation/virt/kvm/api.rst of the Linux kernel.
const (
	kvmGetAPIVersion    = 0xae00
	kvmCreateVM         = 0xae01
	kvmGetVCPUMmapSize  = 0xae04
	kvmCreateVCPU       = 0xae41
	kvmSetTSSAddr       = 0xae47
	kvmRun              = 0xae80
	kvmSetUserMemory    = 0x4020ae46
	kvmGetRegs          = 0x8090ae81
	kvmSetRegs          = 0x4090ae82
	kvmGetSregs         = 0x8138ae83
	kvmSetSregs         = 0x4138ae84
	kvmGetSupportedCPID = 0xc008ae05
	kvmSetCPUID2        = 0x4008ae90

	apiVersion = 12
	exitHLT    = 5
	tssAt      = 0xfffbd000 // three pages below 4 GiB, as the API asks for
	cpuidMax   = 256

	interruptsMax     = 1000 // of one request
	interruptEvery    = 5 * time.Millisecond
	interruptPatience = 100 * time.Millisecond
)

type kvmRegs struct {
	Rax, Rbx, Rcx, Rdx, Rsi, Rdi, Rsp, Rbp uint64
	R8, R9, R10, R11, R12, R13, R14, R15   uint64
	Rip, Rflags                            uint64
}

type kvmSegment struct {
	Base                         uint64
	Limit                        uint32
	Selector                     uint16
	Type, Present, Dpl, Db, S, L uint8
	G, Avl, Unusable, padding    uint8
}

type kvmTable struct {
	Base  uint64
	Limit uint16
	_     [3]uint16
}

type kvmSregs struct {
	Cs, Ds, Es, Fs, Gs, Ss  kvmSegment
	Tr, Ldt                 kvmSegment
	Gdt, Idt                kvmTable
	Cr0, Cr2, Cr3, Cr4, Cr8 uint64
	Efer, ApicBase          uint64
	InterruptBitmap         [4]uint64
}

type kvmMemory struct {
	Slot, Flags          uint32
	GuestAddr, SizeBytes uint64
	UserAddr             uint64
}

type kvmCPUID struct {
	Count, _ uint32
	Entries  [cpuidMax][10]uint32
}

// kvmRunPage is the beginning of the page shared with the kernel.
type kvmRunPage struct {
	RequestInterruptWindow uint8
	ImmediateExit          uint8
	_                      [6]uint8
	ExitReason             uint32
}

// vcpu is one virtual CPU and what must be given back after it.
type vcpu struct {
	dev, vm, cpu int // file descriptors; -1: not open
	run          []byte
	mem          []byte
	tid          atomic.Int32
}

// probe runs the micro-guests one after the other on a thread of their own.
func probe(ctx context.Context, dev string, guests []microGuest) Result {
	v := &vcpu{dev: -1, vm: -1, cpu: -1}
	opened := make(chan error, 1)
	finished := make(chan Result, 1)
	go func() {
		// The thread must not end with its goroutine, as one that stays locked
		// does: children that are to die with their parent are tied to threads.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		v.tid.Store(int32(unix.Gettid()))
		err := v.open(dev)
		opened <- err
		r := unusable("")
		if err != nil {
			r.Why = err.Error()
		} else {
			r = v.runAll(ctx, guests)
		}
		if err := v.close(); err != nil {
			r = unusable(fmt.Sprintf("KVM cannot be closed again: %v", err))
		}
		finished <- r
	}()
	late := unusable(fmt.Sprintf("KVM gave no answer within %v", Timeout))
	select {
	case <-opened:
	case <-ctx.Done():
		return late
	}
	select {
	case r := <-finished:
		return r
	case <-ctx.Done():
	}
	return v.interrupt(finished, late)
}

// interrupt gets a vcpu out of the kernel: a signal ends KVM_RUN. It is sent
// repeatedly, because one that arrives just before the call would be lost, and
// also after the caller was answered, until the thread is back.
// SIGURG is the signal the Go runtime itself uses to interrupt threads.
func (v *vcpu) interrupt(finished <-chan Result, late Result) Result {
	answer := make(chan Result, 1)
	go func() {
		for {
			if err := unix.Tgkill(os.Getpid(), int(v.tid.Load()), unix.SIGURG); err != nil {
				answer <- unusable(late.Why + "; its thread cannot be interrupted: " + err.Error())
				return
			}
			select {
			case r := <-finished:
				answer <- r
				return
			case <-time.After(interruptEvery):
			}
		}
	}()
	select {
	case r := <-answer:
		return r
	case <-time.After(interruptPatience):
		return late
	}
}

// ioctl repeats a request that a signal of the Go runtime has interrupted, as
// happens to those that take long, such as the creation of a VM.
func ioctl(fd int, req uintptr, arg uintptr) (int, error) {
	for range interruptsMax {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, arg)
		if errno == 0 {
			return int(r), nil
		}
		if errno != unix.EINTR {
			return 0, errno
		}
	}
	return 0, unix.EINTR
}

func ioctlPtr(fd int, req uintptr, arg unsafe.Pointer) error {
	for range interruptsMax {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg))
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return errno
		}
	}
	return unix.EINTR
}

// open makes a VM with one vcpu and its memory.
func (v *vcpu) open(dev string) error {
	var err error
	if v.dev, err = unix.Open(dev, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		v.dev = -1
		return openProblem(dev, err)
	}
	n, err := ioctl(v.dev, kvmGetAPIVersion, 0)
	if err != nil {
		return fmt.Errorf("%s is no KVM device: %w", dev, err)
	}
	if n != apiVersion {
		return fmt.Errorf("KVM has API version %d, not %d", n, apiVersion)
	}
	if v.vm, err = ioctl(v.dev, kvmCreateVM, 0); err != nil {
		v.vm = -1
		return fmt.Errorf("KVM cannot create a VM: %w", err)
	}
	if _, err := ioctl(v.vm, kvmSetTSSAddr, tssAt); err != nil {
		return fmt.Errorf("KVM cannot set up a VM: %w", err)
	}
	if err := v.addMemory(); err != nil {
		return err
	}
	return v.addCPU()
}

func openProblem(dev string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("there is no %s", dev)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s may not be opened by this user (add it to group kvm)", dev)
	}
	return fmt.Errorf("%s cannot be opened: %w", dev, err)
}

func (v *vcpu) addMemory() error {
	var err error
	if v.mem, err = unix.Mmap(-1, 0, memBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS); err != nil {
		return fmt.Errorf("no memory for a VM: %w", err)
	}
	region := kvmMemory{SizeBytes: memBytes, UserAddr: uint64(uintptr(unsafe.Pointer(&v.mem[0])))}
	if err := ioctlPtr(v.vm, kvmSetUserMemory, unsafe.Pointer(&region)); err != nil {
		return fmt.Errorf("KVM refuses memory: %w", err)
	}
	return nil
}

func (v *vcpu) addCPU() error {
	var err error
	if v.cpu, err = ioctl(v.vm, kvmCreateVCPU, 0); err != nil {
		v.cpu = -1
		return fmt.Errorf("KVM cannot create a CPU: %w", err)
	}
	size, err := ioctl(v.dev, kvmGetVCPUMmapSize, 0)
	if err != nil {
		return fmt.Errorf("KVM cannot share a CPU's state: %w", err)
	}
	if v.run, err = unix.Mmap(v.cpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("KVM cannot share a CPU's state: %w", err)
	}
	ids := &kvmCPUID{Count: cpuidMax}
	if err := ioctlPtr(v.dev, kvmGetSupportedCPID, unsafe.Pointer(ids)); err != nil {
		return fmt.Errorf("KVM does not tell its CPU features: %w", err)
	}
	if err := ioctlPtr(v.cpu, kvmSetCPUID2, unsafe.Pointer(ids)); err != nil {
		return fmt.Errorf("KVM refuses its own CPU features: %w", err)
	}
	return nil
}

// close gives everything back; it reports the first failure.
func (v *vcpu) close() error {
	var errs []error
	for _, m := range [][]byte{v.run, v.mem} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	for _, fd := range []int{v.cpu, v.vm, v.dev} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}

func (v *vcpu) runAll(ctx context.Context, guests []microGuest) Result {
	for _, g := range guests {
		if why := v.runOne(ctx, g); why != "" {
			return unusable("KVM cannot run " + g.name + ": " + why)
		}
	}
	return Result{Usable: true}
}

// runOne runs a micro-guest to its hlt; "" when it did its work.
func (v *vcpu) runOne(ctx context.Context, g microGuest) string {
	fillMemory(v.mem, g.code)
	if err := v.reset(); err != nil {
		return err.Error()
	}
	page := (*kvmRunPage)(unsafe.Pointer(&v.run[0]))
	for {
		// Asked before the call as well: a caller that has given up while the
		// VM was being made will not interrupt it.
		if ctx.Err() != nil {
			return "it did not end in time"
		}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(v.cpu), kvmRun, 0)
		if ctx.Err() != nil {
			return "it did not end in time"
		}
		if errno == 0 {
			break
		}
		if errno != unix.EINTR { // a signal of the Go runtime
			return errno.Error()
		}
	}
	if page.ExitReason != exitHLT {
		return "it stopped with KVM exit " + exitText(page.ExitReason)
	}
	var regs kvmRegs
	if err := ioctlPtr(v.cpu, kvmGetRegs, unsafe.Pointer(&regs)); err != nil {
		return err.Error()
	}
	if !g.check(v.mem, &regs) {
		return "its result is wrong"
	}
	return ""
}

// exitText names the exits that were met in practice.
func exitText(reason uint32) string {
	names := map[uint32]string{2: "port I/O", 6: "memory access outside", 8: "triple fault", 9: "failed entry", 17: "an instruction KVM cannot emulate"}
	if name := names[reason]; name != "" {
		return fmt.Sprintf("%d (%s)", reason, name)
	}
	return fmt.Sprint(reason)
}

// reset puts the CPU into long mode at the guest's code.
func (v *vcpu) reset() error {
	var s kvmSregs
	if err := ioctlPtr(v.cpu, kvmGetSregs, unsafe.Pointer(&s)); err != nil {
		return err
	}
	s.Cs = kvmSegment{Limit: 0xffffffff, Selector: selCode, Type: 11, Present: 1, S: 1, L: 1, G: 1}
	data := kvmSegment{Limit: 0xffffffff, Selector: selData, Type: 3, Present: 1, S: 1, Db: 1, G: 1}
	s.Ds, s.Es, s.Fs, s.Gs, s.Ss = data, data, data, data, data
	s.Gdt = kvmTable{Base: gdtAt, Limit: 0x17}
	s.Idt = kvmTable{Base: idtAt, Limit: idtGates*16 - 1}
	s.Cr3 = pml4At
	s.Cr0 = 0x80000013 // paging, protection, extension type, monitor coprocessor
	s.Cr4 = 0x620      // physical address extension, SSE and its exceptions
	s.Efer = 0x500     // long mode enabled and active
	if err := ioctlPtr(v.cpu, kvmSetSregs, unsafe.Pointer(&s)); err != nil {
		return fmt.Errorf("no long mode: %w", err)
	}
	return ioctlPtr(v.cpu, kvmSetRegs, unsafe.Pointer(&kvmRegs{Rip: codeAt, Rsp: stackAt, Rflags: 2}))
}
