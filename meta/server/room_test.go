package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/proto/status"
)

// takeAll takes every byte a file system has, as others would: not one block is
// left for a page of a mapped file that has none yet.
func takeAll(t *testing.T, root string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(root, "filler"), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	free, err := freeBytes(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(free)); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	for n := 1 << 20; n > 0; { // what the file system kept for its own tables
		if _, err := f.Seek(0, 2); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(make([]byte, n)); err == nil {
			continue
		} else if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		n /= 2
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// Processes whose disk others fill to the last byte, a real file system with
// holes: one node's first, while the others go on, then all of them. No node
// ends; commands are refused in one sentence, and reads answered; a node that is
// started on a full disk says so; and all go on by themselves once there is room.
func TestADiskFilledToTheLastByte(t *testing.T) {
	if os.Getenv(ownMountsEnv) == "" {
		t.Parallel()
		cmd := exec.Command(os.Args[0], "-test.run=^TestADiskFilledToTheLastByte$", "-test.v")
		cmd.Env = append(os.Environ(), ownMountsEnv+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestADiskFilledToTheLastByte")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	var roots []string
	k := newKillable(t, func(dir string) { roots = append(roots, dir); mountSmall(t, dir) })
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	var addrs []string
	for _, p := range k.peers {
		addrs = append(addrs, p.APIAddr)
	}
	c := client.New(client.Config{Addrs: addrs, Who: "test"})
	hostUp(t, ctx, c, 1)
	const perClient = 75 // with fewer the log ends before Badger needs a page
	n := 0
	work := func() {
		var wg sync.WaitGroup
		for range 8 {
			n++
			from := n * 1000
			wg.Go(func() {
				for i := range perClient {
					if _, err := c.Do(ctx, create(fmt.Sprintf("v%d", from+i))); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
	}
	alive := func(when string) {
		t.Helper()
		for i := range k.procs {
			if k.ended(i) {
				t.Fatalf("%s: %s has ended", when, k.peers[i].ID)
			}
		}
	}
	room := func(root string) {
		t.Helper()
		if err := os.Remove(filepath.Join(root, "filler")); err != nil {
			t.Fatal(err)
		}
	}
	leader := func() (at int) {
		until(t, func() string {
			for i, n := range c.Nodes(ctx) {
				if at = i; n.Leader {
					return ""
				}
			}
			return "no leader"
		})
		return at
	}
	work() // the log has been cut since: it has pages to use again

	full := (leader() + 1) % 3
	takeAll(t, roots[full])
	work()
	alive("one node's disk is full")
	room(roots[full])
	agree(t, ctx, c)

	for _, root := range roots {
		takeAll(t, root)
	}
	if _, err := c.Do(ctx, create("late")); !errors.Is(err, status.NoSpace) || !strings.Contains(err.Error(), "has 0 MiB left on the disk of its metadata and keeps 64 free: make room there") {
		t.Errorf("a creation on full disks: %v", err)
	}
	if got := len(volumes(t, ctx, c)); got != n*perClient {
		t.Errorf("%d volumes are read from full disks, and %d were created", got, n*perClient)
	}
	alive("all disks are full")
	k.kill(full)
	if said := k.tryStart(full); !strings.Contains(said, "has 0 MiB left on the disk of "+k.dirs[full]+" and needs 32: make room there, and it goes on by itself") {
		t.Errorf("a node started on a full disk says %q", said)
	}
	k.procs[full] = nil
	for _, root := range roots {
		room(root)
	}
	k.start(full)
	until(t, func() string { // the leader looks at the others' disks once in a while
		if _, err := c.Do(ctx, create("late")); err != nil {
			return "with room again: " + err.Error()
		}
		return ""
	})
	agree(t, ctx, c)
	alive("there is room again")
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// mountSmall makes a small file system on dir; it is gone with the process's mounts.
func mountSmall(t *testing.T, dir string) {
	t.Helper()
	img := dir + ".img"
	if err := errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, 256<<20)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-F", img}, {"mount", "-o", "loop", img, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
}
