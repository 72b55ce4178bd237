package machine

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

const gib = 1 << 30

// fill makes a file system with a 4 MiB file and returns the file's sha256.
func (r *rig) fill() string {
	r.t.Helper()
	r.sh("mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt")
	r.sh("dd if=/dev/urandom of=/mnt/file bs=64k count=64 conv=fsync")
	return r.sh("sha256sum < /mnt/file")
}

// cold reads the file from the disk again, not from the guest's memory.
func (r *rig) cold() string {
	r.t.Helper()
	return r.sh("sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/file")
}

// TestLifeOfAMachine is the whole path of a guest: file system, growing under
// it, pause, an adoption by another watcher, the power button, and a second
// boot that finds the bytes of the first.
func TestLifeOfAMachine(t *testing.T) {
	r := boot(t, gib)
	if s := r.m.Status(); s.State != "running" || s.PID == 0 || s.Accel == "" {
		t.Fatalf("status after boot: %+v", s)
	}
	if got := r.sh("cat /sys/block/vda/serial"); got != "cairn-v" {
		t.Errorf("serial of the disk is %q", got)
	}
	sum := r.fill()

	// Growing needs the server's consent, and never shrinks.
	if err := r.m.Grow(r.ctx, 0, 2*gib); err == nil || !strings.Contains(err.Error(), "grow the volume first") {
		t.Errorf("grow before the server has grown: %v", err)
	}
	if err := r.m.Grow(r.ctx, 0, gib/2); err == nil || !strings.Contains(err.Error(), "cannot shrink") {
		t.Errorf("shrink: %v", err)
	}
	for i, size := range []uint64{2 * gib, 3 * gib, 3 * gib} {
		r.nbd.grow(int64(size))
		if err := r.m.Grow(r.ctx, 0, size); err != nil {
			t.Fatalf("grow %d: %v", i, err)
		}
		if got := r.sh("cat /sys/block/vda/size"); got != fmt.Sprint(size/512) {
			t.Errorf("after growing to %d bytes the guest sees %s sectors", size, got)
		}
	}
	r.sh("resize2fs /dev/vda")
	if kib := r.sh("df -k /mnt | tail -1 | awk '{print $2}'"); len(kib) < 7 || kib < "2800000" {
		t.Errorf("the grown file system has %s KiB", kib)
	}
	nodes, err := r.m.blockNodes(r.ctx)
	if err != nil || len(nodes) != 2 {
		t.Errorf("block nodes after growing: %v, %v; want one raw and one NBD node", nodes, err)
	}

	r.pauseAndResume()
	r.adopt()
	if got := r.cold(); got != sum {
		t.Errorf("the file changed: %s, was %s", got, sum)
	}
	r.guestErrors()

	r.sh("echo written last > /mnt/last") // not synced: the power button does
	if err := r.m.Stop(r.ctx, false); err != nil {
		t.Fatal(err)
	}
	if why := r.m.Exit(); why != "the guest powered off" {
		t.Errorf("exit: %q", why)
	}
	r.start(specFor(t, r.ctx, r.dir, r.nbd))
	r.sh("mount /dev/vda /mnt")
	if got := r.sh("sha256sum < /mnt/file; cat /mnt/last"); got != sum+"\nwritten last" {
		t.Errorf("after the second boot: %q, want %q and the last line", got, sum)
	}
}

// pauseAndResume sees the guest stand still: it sleeps in units of its own
// clock, and writes nothing to its console while paused.
func (r *rig) pauseAndResume() {
	r.t.Helper()
	for range 2 { // pausing twice is pausing
		if err := r.m.Pause(r.ctx); err != nil {
			r.t.Fatal(err)
		}
	}
	if s := r.m.Status(); s.State != "paused" {
		r.t.Errorf("paused machine is %+v", s)
	}
	ctx, cancel := context.WithTimeout(r.ctx, 300*time.Millisecond)
	defer cancel()
	if out, err := r.con.Run(ctx, "true"); err == nil {
		r.t.Errorf("a paused guest ran a command: %+v", out)
	}
	for range 2 {
		if err := r.m.Resume(r.ctx); err != nil {
			r.t.Fatal(err)
		}
	}
	if s := r.m.Status(); s.State != "running" {
		r.t.Errorf("resumed machine is %+v", s)
	}
	r.sh("true")
}

// adopt replaces the watcher as a restart of the host process does.
func (r *rig) adopt() {
	r.t.Helper()
	pid := r.m.Status().PID
	if _, err := Start(r.ctx, r.m.spec); err == nil || !strings.Contains(err.Error(), "running already") {
		r.t.Errorf("second start of a running machine: %v", err)
	}
	r.m.Release()
	m, err := Find(r.m.spec.Dir, r.m.spec.Name)
	if err != nil {
		r.t.Fatal(err)
	}
	r.m = m
	r.state("running")
	if s := m.Status(); s.PID != pid {
		r.t.Errorf("adopted %+v, want pid %d", s, pid)
	}
}

// TestServerDiesUnderTheGuest kills the NBD server while the guest writes,
// more than once: the guest only waits.
func TestServerDiesUnderTheGuest(t *testing.T) {
	r := boot(t, gib)
	r.sh("mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt")
	for round := range 3 {
		r.background("dd if=/dev/urandom of=/mnt/file bs=64k count=128 conv=fsync && sha256sum < /mnt/file")
		if round < 2 {
			r.nbd.kill()
		} else {
			r.nbd.signal(syscall.SIGSTOP) // hangs instead
		}
		if round == 1 {
			// A pause must not wait for a server that is gone.
			if err := r.m.Pause(r.ctx); err != nil {
				t.Error(err)
			}
			if s := r.m.Status(); s.State != "paused" {
				t.Errorf("paused without a server: %+v", s)
			}
		}
		if round < 2 {
			r.nbd.start()
		} else {
			r.nbd.signal(syscall.SIGCONT)
		}
		if round == 1 {
			if err := r.m.Resume(r.ctx); err != nil {
				t.Fatal(err)
			}
		}
		sum := r.join()
		if got := r.cold(); got != sum {
			t.Errorf("round %d: the file reads %s, was %s", round, got, sum)
		}
	}
	r.guestErrors()
	if s := r.m.Status(); s.IOErrors != 0 {
		t.Errorf("status: %+v", s)
	}
}

// background starts a command in the guest; join waits for it and returns
// what it said.
func (r *rig) background(command string) {
	r.t.Helper()
	r.sh("rm -f /tmp/rc /tmp/out; (" + command + "; echo $? >/tmp/rc) >/tmp/out 2>/tmp/err &")
}

func (r *rig) join() string {
	r.t.Helper()
	return r.sh("while ! [ -s /tmp/rc ]; do usleep 50000; done; cat /tmp/out; [ $(cat /tmp/rc) = 0 ] || { cat /tmp/err; false; }")
}

// TestErrorsOfTheDiskStopTheGuest makes the server answer EIO: the guest stops
// without seeing it, and goes on by itself once the disk is well, also when
// that takes several attempts.
func TestErrorsOfTheDiskStopTheGuest(t *testing.T) {
	r := boot(t, gib)
	sum := r.fill()
	if err := os.WriteFile(r.nbd.errs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.background("dd if=/dev/urandom of=/mnt/other bs=64k count=32 conv=fsync && sha256sum < /mnt/other")
	await(t, r.ctx, "two attempts at healing", func() bool { return r.m.Status().IOErrors >= 3 })
	if s := r.m.Status(); s.State == "io-error" && s.Detail == "" {
		t.Errorf("a machine that waits does not say for what: %+v", s)
	}
	if err := r.m.Pause(r.ctx); err != nil {
		t.Fatal(err)
	}
	if s := r.m.Status(); s.State != "paused" {
		t.Errorf("paused on request while waiting for its disk: %+v", s)
	}
	if err := os.Remove(r.nbd.errs); err != nil {
		t.Fatal(err)
	}
	if err := r.m.Resume(r.ctx); err != nil {
		t.Fatal(err)
	}
	other := r.join()
	r.state("running")
	if got := r.cold(); got != sum {
		t.Errorf("the old file reads %s, was %s", got, sum)
	}
	if got := r.sh("sha256sum < /mnt/other"); got != other {
		t.Errorf("the new file reads %s, was %s", got, other)
	}
	// Again, with the server gone for a while too, and the disk's recovery left
	// to a host process that comes later.
	if err := os.WriteFile(r.nbd.errs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	before := r.m.Status().IOErrors
	r.background("dd if=/dev/urandom of=/mnt/third bs=64k count=32 conv=fsync")
	await(t, r.ctx, "another I/O error", func() bool { return r.m.Status().IOErrors > before })
	r.m.Release()
	r.nbd.kill()
	if err := os.Remove(r.nbd.errs); err != nil {
		t.Fatal(err)
	}
	m, err := Find(r.m.spec.Dir, r.m.spec.Name)
	if err != nil {
		t.Fatal(err)
	}
	r.m = m
	await(t, r.ctx, "the server is missed", func() bool {
		s := m.Status()
		return s.State == "io-error" && strings.Contains(s.Detail, "server is not there")
	})
	r.nbd.start()
	r.join()
	r.state("running")
	r.guestErrors()
	if s := r.m.Status(); s.Detail != "" {
		t.Errorf("all is well, and yet: %+v", s)
	}
}
