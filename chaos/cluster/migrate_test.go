package cluster

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chaos/guest"
)

// Live migration by real processes, with a real guest that writes all the while.

const vmName = "counter"

// vmRow is what `cairn vm show` tells of a VM.
type vmRow struct {
	State   string `json:"state"`
	Desired string `json:"desired"`
	Host    string `json:"host"`
	Step    string `json:"step"`
	Reason  string `json:"reason"`
	Pid     int    `json:"pid"`
	Console string `json:"console"`
}

// mobile is a guest with two disks that counts on both.
type mobile struct {
	t   *testing.T
	c   *Cluster
	ctx context.Context
	con *guest.Console
	at  string // its console's socket
}

// startMobile boots the guest on host-1. It writes i to the first disk, synced,
// then to the second, synced, and then to memory: what is read of the three never
// rises in that order.
func startMobile(t *testing.T, c *Cluster) *mobile {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
	t.Cleanup(cancel)
	img, err := guest.Ensure(ctx, guest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{"d1", "d2"} {
		if err := c.CreateVolume(ctx, v, 128<<20, 3); err != nil {
			t.Fatal(err)
		}
	}
	m := &mobile{t: t, c: c, ctx: ctx}
	m.cairn("vm", "create", vmName, "--volume", "d1", "--disk", "d2", "--memory", strconv.Itoa(guest.MemoryBytes>>20)+"M",
		"--kernel", img.Kernel, "--initrd", img.Initrd, "--append", img.Append)
	m.cairn("vm", "start", vmName, "--host", "host-1")
	m.sh("mkfs.ext4 -q -F /dev/vda && mkfs.ext4 -q -F /dev/vdb && mkdir -p /a /b && mount /dev/vda /a && mount /dev/vdb /b")
	m.sh("(i=0; while :; do i=$((i+1)); for d in /a /b; do echo $i > $d/c.new && sync $d/c.new && mv $d/c.new $d/c; done; echo $i > /tmp/n; mv /tmp/n /tmp/c; done) >/dev/null 2>/tmp/err &")
	m.await("it counts", func() bool { return m.count() > 2 })
	t.Cleanup(func() {
		if t.Failed() {
			ctx, cancel := context.WithTimeout(context.Background(), commandMaxWait)
			defer cancel()
			out, err := c.Cairn(ctx, "events")
			t.Logf("%s\n%v", out, err)
		}
	})
	return m
}

func (m *mobile) cairn(args ...string) string {
	m.t.Helper()
	out, err := m.c.Cairn(m.ctx, args...)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

func (m *mobile) show() (v vmRow, err error) {
	return v, m.c.query(m.ctx, &v, "vm", "show", vmName)
}

func (m *mobile) await(what string, ok func() bool) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.ctx, testMaxWait)
	defer cancel()
	err := m.c.Await(ctx, what, func(context.Context) (bool, string, error) {
		v, err := m.show()
		return ok(), fmt.Sprintf("%+v", v), err
	})
	if err != nil {
		m.t.Fatal(err)
	}
}

// settled waits until the VM runs on one host and is on nobody's way; and checks
// that there is one machine of it, or two while the second is being ended.
func (m *mobile) settled() vmRow {
	m.t.Helper()
	var v vmRow
	m.await("the VM is settled", func() bool {
		var err error
		v, err = m.show()
		return err == nil && v.Step == "" && v.State == "running"
	})
	m.await("one machine is left", func() bool { return m.machines() == 1 })
	return v
}

func (m *mobile) machines() int {
	ps, err := m.c.processes()
	if err != nil {
		m.t.Fatal(err)
	}
	n := 0
	for _, p := range ps {
		if strings.Contains(p.args, "guest="+vmName) {
			n++
		}
	}
	return n
}

// console follows the guest to where it runs.
func (m *mobile) console() *guest.Console {
	m.t.Helper()
	v, err := m.show()
	if err != nil {
		m.t.Fatal(err)
	}
	if m.con != nil && v.Console == m.at {
		return m.con
	}
	con, err := guest.Dial(m.ctx, v.Console)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		if err := con.Close(); err != nil {
			m.t.Error(err)
		}
	})
	m.con, m.at = con, v.Console
	return con
}

func (m *mobile) sh(command string) string {
	m.t.Helper()
	out, err := m.console().Must(m.ctx, command)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

func (m *mobile) count() int {
	m.t.Helper()
	n, err := strconv.Atoi(m.sh("cat /tmp/c 2>/dev/null || echo 0"))
	if err != nil {
		m.t.Fatal(err)
	}
	return n
}

// counts checks that the same guest goes on from where it was, and that neither
// disk has lost anything: read in the order against the writing.
func (m *mobile) counts(from int) {
	m.t.Helper()
	m.await("it counts on", func() bool { return m.count() > from })
	var mem, b, a int
	out := m.sh("echo 3 > /proc/sys/vm/drop_caches; cat /tmp/c /b/c /a/c; cat /tmp/err")
	if _, err := fmt.Sscanf(out, "%d\n%d\n%d", &mem, &b, &a); err != nil {
		m.t.Fatalf("the counters are %q: %v", out, err)
	}
	if mem < from || b < mem || a < b || strings.Count(strings.TrimSpace(out), "\n") > 2 {
		m.t.Errorf("counted to %d before; now %q: memory ≤ second disk ≤ first, and no error, was expected", from, out)
	}
	if log := m.sh("dmesg | grep -i -e 'I/O error' -e 'EXT4-fs error' || true"); log != "" {
		m.t.Errorf("the guest saw errors: %s", log)
	}
}

// TestMigrateLive moves a guest that writes from host to host, and off one that is
// drained.
func TestMigrateLive(t *testing.T) {
	c := startCluster(t)
	m := startMobile(t, c)
	for n := range fromEnv(t, "CAIRN_MIGRATIONS", 3) {
		to := fmt.Sprintf("host-%d", (n+1)%3+1)
		before := m.count()
		var w struct {
			Live    bool    `json:"live"`
			StillMs float64 `json:"stillMs"`
			To      string  `json:"to"`
			Reason  string  `json:"reason"`
		}
		if err := c.query(m.ctx, &w, "vm", "migrate", vmName, "--to", to); err != nil {
			t.Fatal(err)
		}
		t.Logf("%+v", w)
		if !w.Live || w.To != to || w.StillMs <= 0 {
			t.Errorf("moved: %+v", w)
		}
		if v := m.settled(); v.Host != to {
			t.Errorf("it is on %s, not %s: %+v", v.Host, to, v)
		}
		m.counts(before)
		for _, name := range []string{"d1", "d2"} {
			if v, err := c.ShowVolume(m.ctx, name); err != nil || v.Holder != to {
				t.Errorf("volume %s is %+v, %v", name, v, err)
			}
		}
	}
	at, before := m.settled().Host, m.count()
	m.cairn("host", "drain", at)
	m.await("it leaves the drained host", func() bool { v, err := m.show(); return err == nil && v.Host != at })
	m.settled()
	m.counts(before) // from memory: it was not started anew
	m.cairn("vm", "stop", vmName)
	if n := m.machines(); n != 0 {
		t.Errorf("stopped, and %d machines run", n)
	}
}
