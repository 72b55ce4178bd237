package server

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A directory that is closed can be opened at once, although a process that was
// being started meanwhile has still a copy of the lock's descriptor.
func TestAClosedDirectoryIsFree(t *testing.T) {
	dir := t.TempDir()
	d, err := openDir(dir, "meta-1", "c")
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(int(d.lock.Fd())) // as a fork has it
	if err != nil {
		t.Fatal(err)
	}
	copied := os.NewFile(uintptr(fd), "copy")
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	if d, err = openDir(dir, "meta-1", "c"); err != nil {
		t.Fatal(err)
	}
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	if err := copied.Close(); err != nil {
		t.Fatal(err)
	}
}
