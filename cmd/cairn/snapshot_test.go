package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	nbdclient "github.com/cairnstore/cairn/nbd/client"
)

// ticker writes a rising number over all blocks of an area of several disks, one
// block of one disk after the other, each when the one before is answered: at any
// moment the numbers fall at most once, by one, in that order.
type ticker struct {
	t       *testing.T
	disk    []*nbdclient.Patient // outlive their servers
	stop    chan struct{}
	done    chan error
	written atomic.Int64
}

const (
	tickBlocks = 64
	tickAt     = 32 << 20
)

func startTicker(t *testing.T, uris ...string) *ticker {
	t.Helper()
	k := &ticker{t: t, stop: make(chan struct{}), done: make(chan error, 1)}
	for _, u := range uris {
		d, err := nbdclient.DialPatient(context.Background(), u, nil, commandWait)
		if err != nil {
			t.Fatal(err)
		}
		k.disk = append(k.disk, d)
	}
	go func() { k.done <- k.run() }()
	return k
}

func (k *ticker) run() error {
	b := make([]byte, 4096)
	for gen := uint64(1); ; gen++ {
		for i := range int64(tickBlocks) {
			for _, d := range k.disk {
				select {
				case <-k.stop:
					return nil
				default:
				}
				binary.LittleEndian.PutUint64(b, gen)
				if _, err := d.WriteAt(b, tickAt+i*4096); err != nil {
					return fmt.Errorf("write %d of block %d: %w", gen, i, err)
				}
				k.written.Add(1)
			}
		}
	}
}

// goesOn returns when all blocks were written once more.
func (k *ticker) goesOn() {
	k.t.Helper()
	want := k.written.Load() + int64(2*tickBlocks*len(k.disk))
	until(k.t, "the disks are written again", func() bool { return k.written.Load() >= want })
}

func (k *ticker) end() {
	k.t.Helper()
	close(k.stop)
	if err := <-k.done; err != nil {
		k.t.Fatal(err)
	}
	for _, d := range k.disk {
		if err := d.Close(); err != nil {
			k.t.Fatal(err)
		}
	}
}

// oneMoment checks what snapshots of a ticker's disks show.
func oneMoment(t *testing.T, what string, images ...[]byte) {
	t.Helper()
	var last uint64
	falls := 0
	for i := range tickBlocks {
		for d, img := range images {
			gen := binary.LittleEndian.Uint64(img[tickAt+i*4096:])
			if i+d > 0 && gen != last {
				falls++
				if gen+1 != last {
					t.Fatalf("%s: block %d of disk %d has %d after %d", what, i, d, gen, last)
				}
			}
			last = gen
		}
	}
	if falls > 1 {
		t.Fatalf("%s is not one moment: the numbers fall %d times", what, falls)
	}
}

// image exports a volume or snapshot.
func (n *node) image(name string) []byte {
	n.t.Helper()
	f := filepath.Join(filepath.Dir(n.dir), "image")
	n.ok("volume", "export", name, f)
	b, err := os.ReadFile(f)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.Remove(f); err != nil {
		n.t.Fatal(err)
	}
	return b
}

func (n *node) pid(what string) int {
	n.t.Helper()
	b, err := os.ReadFile(filepath.Join(n.dir, "run", what+".pid"))
	if err != nil {
		n.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		n.t.Fatal(err)
	}
	return pid
}

// Snapshots of one disk, and of two at one moment, are taken while both are
// written and hosts are killed: each shows one moment, for ever. They are deleted
// in any order, and the space of what they alone held comes back.
func TestSnapshotsUnderLoadAndKills(t *testing.T) {
	n := startUp(t, dir(t), "--processes")
	var uris []string
	for _, v := range []string{"v", "w"} {
		n.ok("volume", "create", v, "--size", "64M")
		uris = append(uris, n.ok("volume", "attach", v, "--host", "host-1"))
	}
	tool(t, "qemu-io", "-f", "raw", uris[0], "-c", "write -P 1 0 8M")
	k := startTicker(t, uris...)
	shown := map[string][]byte{}
	for i := range 4 {
		g := fmt.Sprint("g", i)
		if out := n.ok("volume", "snapshot", "v", "w", "--name", g); out != "v@"+g+"\nw@"+g {
			t.Fatalf("snapshot: %q", out)
		}
		a, b := n.image("v@"+g), n.image("w@"+g)
		oneMoment(t, g, a, b)
		shown["v@"+g], shown["w@"+g] = a, b
		n.ok("volume", "snapshot", "create", "v", "--name", fmt.Sprint("s", i))
		shown[fmt.Sprint("v@s", i)] = n.image(fmt.Sprint("v@s", i))
		oneMoment(t, "s", shown[fmt.Sprint("v@s", i)])
		if i < 3 { // a host without the gateway goes, and comes back by itself
			if err := syscall.Kill(n.pid(fmt.Sprint("host-", 2+i%2)), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	n.fails("v has a snapshot", "volume", "snapshot", "v", "--name", "g1")
	n.inSync("v")
	for _, s := range []string{"v@g1", "v@s3", "v@g0", "v@s1", "w@g2"} {
		n.ok("volume", "snapshot", "rm", s, "--wait")
		delete(shown, s)
	}
	for s, want := range shown {
		if !bytes.Equal(n.image(s), want) {
			t.Fatalf("%s has changed", s)
		}
	}
	k.end()
	n.ok("volume", "snapshot", "rm", "v@g2", "v@g3", "v@s0", "v@s2", "--wait")
	until(t, "the space is back", func() bool {
		v := decodeJSON[volumeView](t, n.ok("volume", "show", "v", "-o", "json"))
		for _, m := range v.Members {
			if m.LiveBytes != 8<<20+tickBlocks*4096 {
				return false
			}
		}
		return len(v.Snapshots) == 0 && v.Merging == 0
	})
}

// inSync waits until all replicas of a volume are.
func (n *node) inSync(name string) {
	n.t.Helper()
	until(n.t, "all replicas of "+name+" are in sync", func() bool {
		r := n.cairn("volume", "show", name, "-o", "json")
		if r.status != 0 {
			return false
		}
		v := decodeJSON[volumeView](n.t, r.out)
		ok := len(v.Members) == int(v.Replicas)
		for _, m := range v.Members {
			ok = ok && m.State == "in-sync"
		}
		return ok
	})
}

// leader is the metadata node that leads.
func (n *node) leader() (id string) {
	n.t.Helper()
	until(n.t, "a metadata node leads", func() bool {
		r := n.cairn("meta", "ls", "-o", "json")
		if r.status != 0 {
			return false
		}
		for _, m := range decodeJSON[[]struct {
			ID     string
			Leader bool
		}](n.t, r.out) {
			if m.Leader {
				id = m.ID
			}
		}
		return id != ""
	})
	return id
}

// Two volumes attached on two hosts are cut at one moment while one of the hosts, the
// metadata's leader or the command itself is killed somewhere in it: both have the
// snapshot, and it is one moment, or neither has it; and writes go on.
func TestGroupSnapshotsWhileAllDie(t *testing.T) {
	n := startUp(t, dir(t), "--processes")
	var uris []string
	for i, v := range []string{"v", "w"} {
		n.ok("volume", "create", v, "--size", "64M")
		uris = append(uris, n.ok("volume", "attach", v, "--host", fmt.Sprint("host-", i+1)))
	}
	k := startTicker(t, uris...)
	k.goesOn()
	has := func(volume, name string) bool {
		v := decodeJSON[volumeView](t, n.ok("volume", "show", volume, "-o", "json"))
		return slices.Contains(v.Snapshots, name)
	}
	taken := 0
	const rounds, kinds = 24, 4
	for i := range rounds {
		name := fmt.Sprint("g", i)
		victim := []string{"host-1", "host-2", "leader", "command"}[i%kinds]
		pid := 0
		switch victim {
		case "leader":
			pid = n.pid(n.leader())
		case "command":
		default:
			pid = n.pid(victim)
		}
		cmd := n.begun("volume", "snapshot", "v", "w", "--name", name)
		if victim == "command" {
			pid = cmd.Process.Pid
		}
		time.Sleep(time.Duration(4+5*(i/kinds)) * time.Millisecond) // not a wait: which moment of the cut is hit
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		failed := cmd.Wait()
		k.goesOn()
		v, w := has("v", name), has("w", name)
		switch {
		case v != w:
			t.Fatalf("%s, %s killed: v has it: %v, w: %v", name, victim, v, w)
		case failed == nil && !v:
			t.Fatalf("%s, %s killed: the command ended well and there is no snapshot", name, victim)
		case v:
			taken++
			oneMoment(t, name, n.image("v@"+name), n.image("w@"+name))
		}
		n.inSync("v")
		n.inSync("w")
	}
	t.Logf("%d of %d snapshots were taken", taken, rounds)
	took := decodeJSON[takenView](t, n.ok("volume", "snapshot", "v", "w", "--name", "last", "-o", "json"))
	if took.HeldMs > float64(groupHold.Milliseconds()) {
		t.Fatalf("writes were held for longer than they may: %+v", took)
	}
	oneMoment(t, "last", n.image("v@last"), n.image("w@last"))
	k.end()
}

// A golden image, a clone of it, a clone of that: each shows what it began as and
// what was written to it; what others read from is not removed; flattened, each
// stands alone.
func TestClonesOfClones(t *testing.T) {
	n := startUp(t, dir(t))
	base := filepath.Dir(n.dir)
	raw, qcow := filepath.Join(base, "raw"), filepath.Join(base, "qcow2")
	img := make([]byte, 64<<20)
	for i := range img[:20<<20] {
		img[i] = byte(i>>12 + i)
	}
	if err := os.WriteFile(raw, img, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "qemu-img", "convert", "-O", "qcow2", raw, qcow)
	n.ok("volume", "import", "debian", qcow)
	n.ok("volume", "snapshot", "debian", "--name", "gold")
	write := func(vol, cmd string) {
		t.Helper()
		tool(t, "qemu-io", "-f", "raw", n.ok("volume", "attach", vol), "-c", cmd, "-c", "flush")
	}
	write("debian", "write -P 9 0 1M") // the clones must not see it
	n.ok("volume", "clone", "debian@gold", "a")
	if !bytes.Equal(n.image("a"), img) {
		t.Fatal("the clone does not show the image")
	}
	write("a", "write -P 1 1000k 3k") // parts of blocks
	write("a", "write -z 4M 64k")
	write("a", "write -P 2 50M 4k")
	want := bytes.Clone(img)
	fill := func(b []byte, v byte) {
		for i := range b {
			b[i] = v
		}
	}
	fill(want[1000<<10:1003<<10], 1)
	fill(want[4<<20:4<<20+64<<10], 0)
	fill(want[50<<20:50<<20+4096], 2)
	if !bytes.Equal(n.image("a"), want) {
		t.Fatal("the clone does not show what was written")
	}
	n.ok("volume", "snapshot", "a", "--name", "s")
	n.ok("volume", "clone", "a@s", "b")
	write("b", "write -P 3 2M 4k")
	wantB := bytes.Clone(want)
	fill(wantB[2<<20:2<<20+4096], 3)
	if !bytes.Equal(n.image("b"), wantB) {
		t.Fatal("the clone of the clone shows something else")
	}
	if out := tool(t, "nbdinfo", n.ok("volume", "attach", "a@s")); !strings.Contains(out, "is_read_only: true") {
		t.Fatalf("a snapshot is not read-only: %s", out)
	}
	if !bytes.Equal(n.image("debian@gold"), img) {
		t.Fatal("the snapshot has changed")
	}
	n.fails("clones that read from it: a:", "volume", "snapshot", "rm", "debian@gold")
	n.ok("volume", "detach", "debian")
	n.fails("clones that read from it: a:", "volume", "rm", "debian")
	n.fails("snapshot s of clone a", "volume", "flatten", "a")
	n.ok("volume", "flatten", "b")
	n.ok("volume", "detach", "a@s")
	n.ok("volume", "snapshot", "rm", "a@s", "--wait")
	n.ok("volume", "flatten", "a")
	n.ok("volume", "snapshot", "rm", "debian@gold", "--wait")
	n.ok("volume", "rm", "debian", "--now")
	if !bytes.Equal(n.image("a"), want) || !bytes.Equal(n.image("b"), wantB) {
		t.Fatal("a flattened clone shows something else")
	}
	n.ok("volume", "snapshot", "a", "--name", "before")
	write("a", "write -P 7 0 8M")
	n.fails("attached on host", "volume", "rollback", "a@before")
	n.ok("volume", "detach", "a")
	n.ok("volume", "rollback", "a@before")
	if !bytes.Equal(n.image("a"), want) {
		t.Fatal("the rolled back volume shows something else")
	}
	began := time.Now()
	n.ok("volume", "clone", "a@before", "c")
	t.Logf("a clone took %v, the command's start included", time.Since(began))
}
