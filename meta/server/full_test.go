package server

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// ownMountsEnv says that the test is in its own process, whose mounts end with it
// however it ends.
const ownMountsEnv = "CAIRN_OWN_MOUNTS"

// fillDisk leaves so many bytes on a file system.
func fillDisk(t *testing.T, root string, left uint64) {
	t.Helper()
	free, err := freeBytes(root)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(root, "filler"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(make([]byte, free-min(free, left))); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// Three nodes on a real file system that fills up: what is new is refused in time,
// deletions go on for longer, reads all the time; no node ends; and when there is
// room again they go on by themselves. (The last megabytes are Badger's: it writes
// to mapped files, and a node that finds no page for that gets a SIGBUS.)
func TestFullFileSystem(t *testing.T) {
	if os.Getenv(ownMountsEnv) == "" {
		t.Parallel()
		cmd := exec.Command(os.Args[0], "-test.run=^TestFullFileSystem$", "-test.v")
		cmd.Env = append(os.Environ(), ownMountsEnv+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestFullFileSystem")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := unix.Mount("none", root, "tmpfs", 0, "size=320m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	tr := newTrio(t, func(i int, c *Config) {
		c.Dir, c.audit = filepath.Join(root, c.ID), 50*time.Millisecond
		c.Timeout = time.Second // nobody is elected while there is no room for a vote
	})
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	for _, name := range []string{"a", "b", "c"} {
		must(t, ctx, c, create(name))
	}
	rm := func(name string) error {
		_, err := c.Do(ctx, &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: name}}})
		return err
	}
	refused := func(err error) bool {
		return errors.Is(err, status.NoSpace) && strings.Contains(err.Error(), "MiB left on the disk of its metadata")
	}

	fillDisk(t, root, 40<<20)
	if _, err := c.Do(ctx, create("d")); !refused(err) {
		t.Errorf("a creation with 40 MiB left: %v", err)
	}
	if err := rm("a"); err != nil {
		t.Errorf("a deletion with 40 MiB left: %v", err)
	}
	fillDisk(t, root, 8<<20)
	if _, err := c.Do(ctx, create("d")); !refused(err) {
		t.Errorf("a creation with 8 MiB left: %v", err)
	}
	if err := rm("b"); !refused(err) {
		t.Errorf("a deletion with 8 MiB left: %v", err)
	}
	if got := volumes(t, ctx, c); len(got) != 2 {
		t.Errorf("%d volumes are read with 8 MiB left, and two are there", len(got))
	}

	if err := os.Remove(filepath.Join(root, "filler")); err != nil {
		t.Fatal(err)
	}
	until(t, func() string { // the leader looks at the others' disks once in a while
		if _, err := c.Do(ctx, create("d")); err != nil {
			return "with room again: " + err.Error()
		}
		return ""
	})
	if err := rm("b"); err != nil {
		t.Error(err)
	}
	tr.agree()
	for _, s := range tr.nodes {
		if err := s.Err(); err != nil {
			t.Error(err)
		}
	}
}
