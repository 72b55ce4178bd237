package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"

	nbdclient "github.com/cairnstore/cairn/nbd/client"
)

// evidence returns what status finds, and its exit status with --exit-code.
func (n *node) evidence() (string, int) {
	n.t.Helper()
	r := n.cairn("status", "--exit-code")
	return r.out + r.err, r.status
}

// A write that waits for room holds a detach for some seconds and no longer; forced,
// the detach ends, the write fails, and all that was acknowledged is there.
func TestADetachOnAFullPool(t *testing.T) {
	n := startUp(t, dir(t), "--store-size", "1G")
	const size, chunk, piece = 640 << 20, 64 << 20, 1 << 20
	devs := map[string]*nbdclient.Client{}
	for _, name := range []string{"v", "w"} {
		n.ok("volume", "create", name, "--size", "640M")
		dev, err := nbdclient.Dial(context.Background(), n.ok("volume", "attach", name), nil)
		if err != nil {
			t.Fatal(err)
		}
		for off := int64(0); off < size; off += chunk { // every chunk has its place: none is refused for want of room
			if _, err := dev.WriteAt(bytes.Repeat([]byte{9}, 4096), off); err != nil {
				t.Fatal(err)
			}
		}
		devs[name] = dev
	}
	written := map[string]int64{}
	fill := func(name string) (err error) {
		buf := bytes.Repeat([]byte(name), piece)
		for off := int64(0); off < size && err == nil; off += piece {
			if _, err = devs[name].WriteAt(buf, off); err == nil {
				written[name] = off + piece
			}
		}
		return err
	}
	if err := fill("v"); err != nil {
		t.Fatalf("the pool is full too soon: %v", err)
	}
	stuck := make(chan error, 1)
	go func() { stuck <- fill("w") }()
	until(t, "a write waits for room, and status says so", func() bool {
		says, code := n.evidence()
		return code == 2 && strings.Contains(says, "volume w: writes wait for room on host-")
	})
	n.fails("wait for room on host-", "volume", "detach", "w")
	if w := decodeJSON[volumeView](t, n.ok("volume", "show", "w", "-o", "json")); w.Holder == "" {
		t.Fatalf("after a detach that failed: %+v", w)
	}
	n.ok("volume", "detach", "w", "--force")
	if err := <-stuck; err == nil {
		t.Fatal("the write that waited was acknowledged")
	}
	if w := decodeJSON[volumeView](t, n.ok("volume", "show", "w", "-o", "json")); w.Holder != "" {
		t.Fatalf("after a detach by force: %+v", w)
	}
	n.ok("volume", "detach", "v", "--force")
	n.ok("volume", "rm", "v", "--now")
	dev, err := nbdclient.Dial(context.Background(), n.ok("volume", "attach", "w"), nil)
	if err != nil {
		t.Fatal(err)
	}
	got, want := make([]byte, piece), bytes.Repeat([]byte("w"), piece)
	for off := int64(0); off < written["w"]; off += piece {
		if _, err := dev.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("what was acknowledged at %d is not there: %v", off, err)
		}
	}
	if err := dev.Close(); err != nil {
		t.Error(err)
	}
	n.ok("volume", "detach", "w")
}

// On bad days status says what is wrong and for whom, and its exit status too.
func TestStatusOnBadDays(t *testing.T) {
	d := dir(t)
	n := startUp(t, d, "--processes", "--store-size", "1G")
	signal := func(sig syscall.Signal, names ...string) {
		t.Helper()
		for _, name := range names {
			pid, err := readPid(filepath.Join(d, "run", name+".pid"))
			if err == nil {
				err = syscall.Kill(pid, sig)
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	n.ok("volume", "create", "v", "--size", "64M")
	tool(t, "qemu-io", "-f", "raw", n.ok("volume", "attach", "v", "--host", "host-1"), "-c", "write -P 1 0 64k")
	says := func(code int, what ...string) {
		t.Helper()
		var seen string
		defer func() {
			if t.Failed() {
				t.Log(seen)
			}
		}()
		until(t, strings.Join(what, ", "), func() bool {
			text, got := n.evidence()
			seen = text
			for _, w := range what {
				if !strings.Contains(text, w) {
					return false
				}
			}
			return got == code
		})
	}
	says(0, "healthy")
	// Before the leader changes: a new one does not know since when a host is silent that it never heard.
	signal(syscall.SIGSTOP, "host-2")
	says(1, "host host-2 is down, since 2", "without their copy there: v", "volume v: 1 of its 3 stores are out of sync or away", "on host-2: host down", "2 good copies left")
	signal(syscall.SIGCONT, "host-2")
	says(0, "healthy")
	signal(syscall.SIGSTOP, "meta-2")
	says(2, "metadata node meta-2 does not answer: 2 of 3 do, since", "0 more may fail")
	signal(syscall.SIGSTOP, "meta-3")
	says(2, "does not answer", "no leader", "2 of its 3 nodes", "nothing can be attached")
	signal(syscall.SIGCONT, "meta-2", "meta-3")
	says(0, "healthy")
	n.ok("host", "drain", "host-3")
	says(1, "host host-3 is drained", "copies of v", "it cannot finish", "the 2 hosts in service", "new chunks of v go there too")
	n.ok("volume", "create", "late", "--size", "64M", "--replicas", "3")
	tool(t, "qemu-io", "-f", "raw", n.ok("volume", "attach", "late", "--host", "host-1"), "-c", "write -P 2 0 64k") // a guest goes on
	n.ok("host", "resume", "host-3")
	signal(syscall.SIGSTOP, "host-2", "host-3")
	n.ok("status")
	for _, s := range decodeJSON[[]storeView](t, n.ok("store", "ls", "-o", "json")) {
		if s.Host != "host-2" {
			continue
		}
		if x := decodeJSON[storeDetail](t, n.ok("store", "show", s.ID, "-o", "json")); x.CopiesLeft != 2 || !strings.Contains(x.State, "not reached") {
			t.Errorf("a store whose host does not answer: %+v", x)
		}
	}
	says(2, "volume v: 2 of its 3 stores are out of sync or away", "one good copy left")
	signal(syscall.SIGCONT, "host-2", "host-3")
	says(0, "healthy")
	signal(syscall.SIGSTOP, "host-1")
	says(1, "host host-1 is down", "attached there and without service: v", "--takeover")
	n.refuses("--takeover` serves the volume elsewhere", "volume", "detach", "v", "--force")
	signal(syscall.SIGCONT, "host-1")
	says(0, "healthy")

	// The only copy of a block is damaged.
	n.ok("volume", "create", "one", "--size", "64M", "--replicas", "1")
	uri := n.ok("volume", "attach", "one", "--host", "host-1")
	tool(t, "qemu-io", "-f", "raw", uri, "-c", "write -P 77 0 64k", "-c", "flush")
	on := decodeJSON[volumeView](t, n.ok("volume", "show", "one", "-o", "json")).Members[0]
	file := decodeJSON[storeDetail](t, n.ok("store", "show", on.Store, "-o", "json")).Path
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, bytes.Repeat([]byte{77}, 4096))
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err == nil && at >= 0 {
		_, err = f.WriteAt([]byte{78}, int64(at)+5)
		err = errors.Join(err, f.Close())
	}
	if err != nil || at < 0 {
		t.Fatalf("the block is at %d: %v", at, err)
	}
	if r := n.cairn("store", "verify", on.Store); r.status != exitFailed {
		t.Errorf("a damaged store is verified: %+v", r)
	}
	says(2, "volume one: its copy on host "+on.Host, "has 1 damaged block", "no other copy can be asked")
	if r := run(t, "qemu-io", "-f", "raw", uri, "-c", "read 0 64k"); !strings.Contains(r.out+r.err, "error") {
		t.Errorf("a damaged block was read: %+v", r)
	}
	says(2, "volume one: requests of its users were answered with an error (1 of them")
	const event = "volume one: a request of its users was answered with an error"
	until(t, "it is in the event log", func() bool { return strings.Contains(n.ok("events"), event) })
}

// Bounds hold for a real client, whatever it asks for; and a volume that was promised
// more than it gets holds back its neighbour, until the promise is taken away.
func TestBoundsAndPromisesForRealClients(t *testing.T) {
	n := startUp(t, dir(t))
	const iops, burst = 200, 1 // of the bound; seconds
	uris := map[string]string{}
	for name, bounds := range map[string][]string{"bound": {"--iops", fmt.Sprint(iops)}, "promised": {"--min-iops", "1000000"}, "other": nil} {
		n.ok(append([]string{"volume", "create", name, "--size", "64M"}, bounds...)...)
		uris[name] = n.ok("volume", "attach", name, "--host", "host-1")
	}
	load := func(name string, seconds int) []string {
		return []string{"--name=v", "--ioengine=nbd", "--uri=" + uris[name], "--rw=randrw", "--bs=4k", "--iodepth=8", "--size=64m", "--time_based",
			fmt.Sprintf("--runtime=%d", seconds), "--output-format=json"}
	}
	out := tool(t, "fio", load("bound", 3)...)
	var res struct {
		Jobs []struct {
			Read, Write struct {
				Ios     int `json:"total_ios"`
				Runtime int `json:"runtime"` // ms
			}
		}
	}
	if err := json.Unmarshal([]byte(out[strings.IndexByte(out, '{'):]), &res); err != nil || len(res.Jobs) != 1 {
		t.Fatalf("fio says %s: %v", out, err)
	}
	j := res.Jobs[0]
	if ops, ms := j.Read.Ios+j.Write.Ios, max(j.Read.Runtime, j.Write.Runtime); ops == 0 || ops > iops*ms/1000+iops*burst+8 {
		t.Errorf("%d operations in %d ms, with a bound of %d a second", ops, ms, iops)
	}

	for _, name := range []string{"promised", "other"} {
		fio := exec.Command("fio", load(name, 120)...)
		fio.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := fio.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = fio.Process.Kill() // it may have ended
			_ = fio.Wait()         // killed
		}()
	}
	const held = "for what others are promised"
	shown := func(name string) string { return n.ok("volume", "show", name) }
	until(t, "the neighbour is held back", func() bool { return strings.Contains(shown("other"), held) })
	n.ok("volume", "set", "promised", "--min-iops", "0")
	until(t, "nobody is held back any more", func() bool { return !strings.Contains(shown("other"), held) })
}

// What a change does not name stays as it is: a volume's bounds, a tenant's quotas.
func TestASettingNotGivenStays(t *testing.T) {
	n := startUp(t, dir(t), "--store-size", "1G")
	n.ok("volume", "create", "v", "--size", "64M", "--iops", "5000", "--tenant", "acme")
	n.ok("volume", "set", "v", "--min-iops", "100")
	n.ok("volume", "set", "v", "--bandwidth", "200M", "--iops", "4000")
	if w := decodeJSON[volumeView](t, n.ok("volume", "show", "v", "-o", "json")); w.Qos == nil || w.Qos.IOPS != 4000 || w.Qos.MinIOPS != 100 || w.Qos.Bandwidth != 200<<20 {
		t.Fatalf("bounds: %+v", w.Qos)
	}
	n.ok("tenant", "set", "acme", "--logical", "1G")
	n.ok("tenant", "set", "acme", "--physical", "2G")
	if ts := decodeJSON[[]tenantView](t, n.ok("tenant", "ls", "-o", "json")); len(ts) != 1 || ts[0].LogicalQuota != 1<<30 || ts[0].PhysicalQuota != 2<<30 {
		t.Fatalf("quotas: %+v", ts)
	}
	n.refuses("may have 1 GiB", "volume", "create", "w", "--size", "1G", "--tenant", "acme", "--replicas", "1")
	n.ok("tenant", "set", "acme", "--logical", "0")
	n.ok("volume", "create", "w", "--size", "960M", "--tenant", "acme", "--replicas", "1")
	n.ok("volume", "snapshot", "v", "--name", "s")
	n.ok("volume", "clone", "v@s", "c")
	if out := n.ok("volume", "show", "c"); !strings.Contains(out, "v@s") {
		t.Errorf("a clone does not show what it is one of: %s", out)
	}
	n.refuses("c", "volume", "rm", "v")
}

// Every command that does something has an example, and offers the names there are.
func TestEveryCommandHasAnExample(t *testing.T) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if !c.HasSubCommands() && !c.Hidden && c.Name() != "help" && c.Example == "" {
			t.Errorf("`%s --help` has no example", c.CommandPath())
		}
		for _, s := range c.Commands() {
			walk(s)
		}
	}
	walk(rootCommand())
	n := startUp(t, dir(t), "--store-size", "1G")
	n.ok("volume", "create", "data", "--size", "64M")
	n.ok("volume", "snapshot", "data", "--name", "monday")
	for _, c := range []struct{ typed, offers string }{
		{"volume show", "data"}, {"volume attach", "data@monday"}, {"volume snapshot rm", "data@monday"}, {"volume attach data --host", "host-2"},
		{"host drain", "host-3"}, {"meta remove", "meta-1"}, {"store show", "on host-1"}, {"volume ls -o", "json"}, {"volume clone", "data@monday"}, {"volume backup", "data"}, {"why --volume", "data"},
	} {
		if r := run(t, bin(t), append(append([]string{"__complete", "--dir", n.dir}, strings.Fields(c.typed)...), "")...); !strings.Contains(r.out, c.offers) {
			t.Errorf("`cairn %s` and Tab: %q, want %q", c.typed, r.out, c.offers)
		}
	}
	if r := run(t, bin(t), "__complete", "--dir", n.dir, "volume", "create", ""); strings.Contains(r.out, "data") {
		t.Errorf("a new name is completed: %q", r.out)
	}
}

// A cluster that cannot be is refused before anything is made of it.
func TestAStoreTooSmallMakesNoCluster(t *testing.T) {
	d := filepath.Join(dir(t), "c")
	if r := run(t, bin(t), "up", "--dir", d, "--store-size", "1"); r.status != exitUsage || !strings.Contains(r.err, "at least 128 MiB") {
		t.Fatalf("status %d: %s", r.status, r.err)
	}
	if r := run(t, bin(t), "status", "--dir", d); !strings.Contains(r.err, "no cluster") {
		t.Fatalf("afterwards there is a cluster: %s", r.err)
	}
	if r := run(t, bin(t), "--version"); r.status != 0 || !strings.Contains(r.out, "state version") {
		t.Fatalf("--version: %q %q", r.out, r.err)
	}
}
