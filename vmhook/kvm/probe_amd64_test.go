package kvm

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestNoDevice(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ dev, want string }{
		{filepath.Join(dir, "none"), "there is no"},
		{plain, "is no KVM device"},
		{"/dev/null", "is no KVM device"},
		{dir, "cannot be opened"},
	} {
		if r := probe(context.Background(), c.dev, microGuests); r.Usable || !strings.Contains(r.Why, c.want) {
			t.Errorf("%s: %+v, want %q", c.dev, r, c.want)
		}
	}
}

// needKVM skips where no VM can be made at all; where one can, also one that
// only interprets, the rest of this file runs.
func needKVM(t *testing.T) {
	t.Helper()
	v := &vcpu{dev: -1, vm: -1, cpu: -1}
	err := v.open(devKVM)
	if cerr := v.close(); cerr != nil {
		t.Fatal(cerr)
	}
	if err != nil {
		t.Skipf("no VM can be made here: %v", err)
	}
}

// TestMicroGuests runs guests that go wrong in each way there is.
func TestMicroGuests(t *testing.T) {
	needKVM(t)
	always := func(result bool) func([]byte, *kvmRegs) bool {
		return func([]byte, *kvmRegs) bool { return result }
	}
	good := microGuest{"a halt", []byte{0xf4}, always(true)}
	for _, c := range []struct {
		guests []microGuest
		want   string
	}{
		{nil, ""},
		{[]microGuest{good, good}, ""},
		{[]microGuest{good, {"a lie", []byte{0xf4}, always(false)}}, "cannot run a lie: its result is wrong"},
		// in al,dx asks the machine for a device.
		{[]microGuest{{"a device", []byte{0xec}, always(true)}}, "cannot run a device: it stopped with KVM exit 2"},
	} {
		r := probe(context.Background(), devKVM, c.guests)
		if r.Usable != (c.want == "") || !strings.Contains(r.Why, c.want) {
			t.Errorf("%+v, want %q", r, c.want)
		}
	}
}

// TestAGuestThatHangs never ends by itself: the caller gets its answer at its
// deadline, and the thread comes back.
func TestAGuestThatHangs(t *testing.T) {
	needKVM(t)
	hang := []microGuest{{"an endless loop", []byte{0xeb, 0xfe}, nil}}
	for _, d := range []time.Duration{0, time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(context.Background(), d)
		r := probe(ctx, devKVM, hang)
		cancel()
		// Given up in the guest, or before it has started.
		if r.Usable || !strings.Contains(r.Why, "in time") && !strings.Contains(r.Why, "no answer within") {
			t.Errorf("%v: %+v", d, r)
		}
	}
	// No vcpu is left running: its thread would hold its descriptors open.
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for open := -1; open != 0; {
		if open = kvmFiles(t); open != 0 && ctx.Err() != nil {
			t.Fatalf("%d KVM files are still open", open)
		}
		runtime.Gosched()
	}
}

// kvmFiles counts the open descriptors of KVM.
func kvmFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range list {
		// A descriptor may be gone since: the one that reads the list is.
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.Contains(to, "kvm") {
			n++
		}
	}
	return n
}

// TestNothingStaysOpen counts file descriptors over probes that fail at every
// stage.
func TestNothingStaysOpen(t *testing.T) {
	next := func() int {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Close(fd); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	probe(context.Background(), devKVM, microGuests)
	before := next()
	for range 10 {
		probe(context.Background(), devKVM, microGuests)
		probe(context.Background(), "/dev/null", microGuests)
	}
	if after := next(); after != before {
		t.Errorf("lowest free descriptor: %d, then %d", before, after)
	}
}
