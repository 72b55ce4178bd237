package kvm

import (
	"context"
	"os"
	"path/filepath"
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
	before := threads(t)
	for range 5 {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		r := probe(ctx, devKVM, hang)
		cancel()
		if r.Usable || !strings.Contains(r.Why, "an endless loop: it did not end in time") {
			t.Errorf("%+v", r)
		}
	}
	if after := threads(t); after > before+4 {
		t.Errorf("%d threads before, %d after 5 hanging guests", before, after)
	}
}

func threads(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
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
