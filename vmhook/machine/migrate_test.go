package machine

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chaos/guest"
	"github.com/cairnstore/cairn/proto/status"
)

// receiver starts the machine that r's is to become, in a directory of its own.
func (r *rig) receiver(dir string) (*Machine, string) {
	r.t.Helper()
	spec := r.m.Spec()
	spec.Dir, spec.Incoming = filepath.Join(r.dir, dir), true
	m, err := Start(r.ctx, spec)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		// It has ended, or the test has released it, found it again and stopped that.
		if err := m.Stop(context.Background(), true); err != nil && !errors.Is(err, status.Unavailable) && !errors.Is(err, status.Shutdown) {
			r.t.Error(err)
		}
		m.Release()
	})
	if s := m.Status(); s.State != "arriving" {
		r.t.Errorf("waiting for its memory it is %+v", s)
	}
	socket, err := m.Receive(r.ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return m, socket
}

// count starts a guest program that writes a counter to the disk, synced, and
// keeps it in memory too; counted reads both, and the disk's is not behind.
func (r *rig) count() {
	r.t.Helper()
	r.sh("mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt")
	r.sh("(i=0; while :; do i=$((i+1)); echo $i > /mnt/c.new && sync /mnt/c.new && mv /mnt/c.new /mnt/c && echo $i > /tmp/n && mv /tmp/n /tmp/c; done) >/dev/null 2>/tmp/err &")
	await(r.t, r.ctx, "it counts", func() bool { return r.counted() > 3 })
}

func (r *rig) counted() int {
	r.t.Helper()
	n, err := strconv.Atoi(r.sh("cat /tmp/c 2>/dev/null || echo 0"))
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// goesOn checks that the guest runs, writes, and sees no error.
func (r *rig) goesOn(from int) {
	r.t.Helper()
	await(r.t, r.ctx, "it counts on", func() bool { return r.counted() > from })
	if out := r.sh("cat /tmp/err; cat /mnt/c"); out == "" {
		r.t.Error("the counter on the disk is empty")
	}
	r.guestErrors()
}

func (r *rig) dialConsole(m *Machine) {
	r.t.Helper()
	con, err := guest.Dial(r.ctx, m.Status().Console)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := con.Close(); err != nil {
			r.t.Error(err)
		}
	})
	r.m, r.con = m, con
}

// TestMigrate moves a guest that writes all the while to another QEMU.
func TestMigrate(t *testing.T) {
	r := boot(t, gib)
	r.count()
	a := r.m
	b, socket := r.receiver("b")
	if err := b.Pause(r.ctx); !errors.Is(err, status.Conflict) {
		t.Errorf("one that arrives is paused: %v", err)
	}
	before := r.counted()
	begun := time.Now()
	if err := a.Send(r.ctx, socket); err != nil {
		t.Fatal(err)
	}
	sent := time.Since(begun)
	for _, err := range []error{a.Pause(r.ctx), a.Resume(r.ctx), a.Grow(r.ctx, 0, 2*gib)} {
		if !errors.Is(err, status.Conflict) {
			t.Errorf("while it moves: %v", err)
		}
	}
	short, cancel := context.WithTimeout(r.ctx, 50*time.Millisecond)
	defer cancel()
	if err := b.Land(short); err == nil {
		t.Fatal("it landed before its memory was there")
	}
	if err := errors.Join(a.Finish(r.ctx), a.Finish(r.ctx), b.Arrived(r.ctx)); err != nil {
		t.Fatal(err)
	}
	if g, err := a.Migration(r.ctx); err != nil || g.Sent == 0 || g.Total == 0 {
		t.Errorf("what was sent: %+v, %v", g, err)
	}
	if s := b.Status(); s.State != "arriving" {
		t.Errorf("arrived, and not told to run: %+v", s)
	}
	b.Release() // its host process is restarted in this moment
	b, err := Find(b.spec.Dir, b.spec.Name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Stop(context.Background(), true); err != nil {
			t.Error(err)
		}
		b.Release()
	})
	if err := errors.Join(b.Land(r.ctx), b.Land(r.ctx)); err != nil {
		t.Fatal(err)
	}
	t.Logf("sent in %v, stood still for %v (machine not alone)", sent, time.Since(a.Stopped()))
	if err := a.Stop(r.ctx, true); err != nil {
		t.Fatal(err)
	}
	r.dialConsole(b)
	r.goesOn(before)
	if s := b.Status(); s.State != "running" || b.Arriving() {
		t.Errorf("landed: %+v", s)
	}
	if err := b.Pause(r.ctx); err != nil {
		t.Errorf("pause after landing: %v", err)
	}
	if err := b.Resume(r.ctx); err != nil {
		t.Error(err)
	}
}

// memory writes the guest's memory above its first MiB, which holds devices, to a file.
func (r *rig) memory(m *Machine, file string) []byte {
	r.t.Helper()
	const from = 1 << 20
	file = filepath.Join(r.dir, file)
	if err := m.do(r.ctx, "pmemsave", object{"val": from, "size": m.spec.MemoryBytes - from, "filename": file}, nil); err != nil {
		r.t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

// TestMemoryArrivesWhole compares every page of the guest on both sides, when A has
// given all away and B does not run yet. The guest keeps changing the same pages, and
// a short bound has QEMU send them more than once.
func TestMemoryArrivesWhole(t *testing.T) {
	r := boot(t, gib)
	r.sh(`awk 'BEGIN { for (;;) { n++; for (i = 0; i < 20000; i++) a[i] = n+i } }' >/dev/null 2>&1 &`)
	b, socket := r.receiver("b")
	sent := make(chan error, 1)
	go func() { sent <- r.m.Send(r.ctx, socket) }()
	state := func() string {
		g, err := r.m.Migration(r.ctx)
		if err != nil {
			t.Fatal(err)
		}
		return g.State
	}
	await(t, r.ctx, "it sends", func() bool { s := state(); return s != "none" && s != "setup" })
	still := func(ms int) {
		if err := r.m.do(r.ctx, "migrate-set-parameters", object{"downtime-limit": ms}, nil); err != nil {
			t.Error(err)
		}
	}
	still(1)
	var q struct {
		RAM struct {
			Rounds int `json:"dirty-sync-count"`
		} `json:"ram"`
	}
	await(t, r.ctx, "it sends pages again", func() bool {
		if err := r.m.do(r.ctx, "query-migrate", nil, &q); err != nil {
			t.Fatal(err)
		}
		return q.RAM.Rounds >= 4 || state() != "active"
	})
	still(1000)
	if err := errors.Join(<-sent, r.m.Finish(r.ctx), b.Arrived(r.ctx)); err != nil {
		t.Fatal(err)
	}
	was, is := r.memory(r.m, "was"), r.memory(b, "is")
	const page = 4096
	var stale []int
	for at := 0; at < len(was); at += page {
		if !bytes.Equal(was[at:at+page], is[at:at+page]) {
			stale = append(stale, at/page)
		}
	}
	if len(stale) > 0 {
		t.Errorf("%d of %d pages did not arrive as they were, among them %v", len(stale), len(was)/page, stale[:min(len(stale), 8)])
	}
}

// TestGoBack gives a migration up at each stage: the guest goes on where it was.
func TestGoBack(t *testing.T) {
	r := boot(t, gib)
	r.count()
	refuse, err := net.Listen("unix", filepath.Join(r.dir, "refuse"))
	if err != nil {
		t.Fatal(err)
	}
	go func() { // accepts, and hangs up
		for {
			c, err := refuse.Accept()
			if err != nil {
				return
			}
			if err := c.Close(); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		if err := refuse.Close(); err != nil {
			t.Error(err)
		}
	})
	end := func(b *Machine) {
		if err := b.Stop(r.ctx, true); err != nil {
			t.Fatal(err)
		}
	}
	for _, stage := range []struct {
		name string
		run  func()
	}{
		{"nobody takes it", func() {
			if err := r.m.Send(r.ctx, refuse.Addr().String()); err == nil {
				t.Error("sent to nobody")
			}
		}},
		{"sent", func() {
			b, socket := r.receiver("sent")
			if err := r.m.Send(r.ctx, socket); err != nil {
				t.Fatal(err)
			}
			end(b)
		}},
		{"the other died before the rest", func() {
			b, socket := r.receiver("died")
			if err := r.m.Send(r.ctx, socket); err != nil {
				t.Fatal(err)
			}
			end(b)
			if err := r.m.Finish(r.ctx); err == nil {
				t.Error("finished without the other")
			}
		}},
		{"the other died after all", func() {
			b, socket := r.receiver("after")
			if err := r.m.Send(r.ctx, socket); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(r.m.Finish(r.ctx), b.Arrived(r.ctx)); err != nil {
				t.Fatal(err)
			}
			end(b)
		}},
		{"its own host process died in between", func() {
			b, socket := r.receiver("own")
			if err := r.m.Send(r.ctx, socket); err != nil {
				t.Fatal(err)
			}
			end(b)
			r.m.Release()
			m, err := Find(r.m.spec.Dir, r.m.spec.Name)
			if err != nil {
				t.Fatal(err)
			}
			r.m = m
		}},
		{"and a later one begins anew", func() {
			b, socket := r.receiver("anew-1")
			if err := r.m.Send(r.ctx, socket); err != nil {
				t.Fatal(err)
			}
			r.m.Release()
			m, err := Find(r.m.spec.Dir, r.m.spec.Name)
			if err != nil {
				t.Fatal(err)
			}
			r.m = m
			c, socket := r.receiver("anew-2")
			if err := r.m.Send(r.ctx, socket); err != nil {
				t.Fatal(err)
			}
			end(b)
			end(c)
		}},
	} {
		from := r.counted()
		stage.run()
		if err := r.m.GoBack(r.ctx); err != nil {
			t.Fatalf("%s: %v", stage.name, err)
		}
		r.goesOn(from)
		if s := r.m.Status(); s.State != "running" {
			t.Errorf("%s: %+v", stage.name, s)
		}
	}
}

// TestMigrateAgain moves a guest from one QEMU to the next, several times.
func TestMigrateAgain(t *testing.T) {
	r := boot(t, gib)
	t.Cleanup(func() {
		if log, err := os.ReadFile(r.m.Status().Log); t.Failed() && err == nil {
			t.Logf("its console: %s", log[max(0, len(log)-4000):])
		}
	})
	r.count()
	for n := range 6 {
		before := r.counted()
		b, socket := r.receiver("again-" + strconv.Itoa(n))
		if err := errors.Join(r.m.Send(r.ctx, socket), r.m.Finish(r.ctx), b.Land(r.ctx)); err != nil {
			t.Fatal(err)
		}
		if err := r.m.Stop(r.ctx, true); err != nil {
			t.Fatal(err)
		}
		r.dialConsole(b)
		r.goesOn(before)
	}
}
