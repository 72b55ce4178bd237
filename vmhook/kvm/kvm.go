// Package kvm finds out whether /dev/kvm can run a 64-bit guest, by running
// tiny ones.
//
// Duty: Probe. Floor: F1. It starts no machine and knows no QEMU.
//
// The file being there says little: where KVM is emulated without hardware
// support, a few hundred thousand instructions a second are interpreted, some
// not at all, and a stock kernel never finishes unpacking itself. What such a
// KVM cannot do, and a kernel needs, is what the micro-guests do: an SSE store,
// an exception with its return in long mode, and a counted loop in good time.
package kvm

import (
	"context"
	"time"
)

// Timeout bounds Probe, whatever the caller's context allows.
const Timeout = 2 * time.Second

// Result is what Probe found.
type Result struct {
	Usable bool
	Why    string // why not; "" when usable
}

// Probe reports whether KVM works here. It returns within Timeout, also when
// a micro-guest hangs: the thread that runs it is signalled until it comes
// back, and if the kernel does not even do that, it is left behind.
func Probe(ctx context.Context) Result {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	return probe(ctx, devKVM, microGuests)
}

const devKVM = "/dev/kvm"

func unusable(why string) Result { return Result{Why: why} }
