package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

func open(t *testing.T, dir string) *Pages {
	t.Helper()
	p, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func saved(t *testing.T, p *Pages, at uint64, batch ...store.SavedPage) {
	t.Helper()
	done := make(chan error, 1)
	p.Save(at, batch, func(err error) { done <- err })
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// as lists what Load gives as of a version; a page that something newer covers
// has a + behind it.
func as(t *testing.T, p *Pages, at uint64) (list string, top uint64) {
	t.Helper()
	top, err := p.Load(at, func(s store.SavedPage, newer bool) error {
		list += fmt.Sprintf("%s=%s", s.Key, s.Page)
		if newer {
			list += "+"
		}
		list += " "
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(list), top
}

// Versions are told apart, over a reopening and tables that were compacted, and
// Keep leaves all that it must.
func TestVersionsOfPages(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pages")
	p := open(t, dir)
	page := func(k, v string) store.SavedPage { return store.SavedPage{Key: []byte(k), Page: []byte(v)} }
	gone := func(k string) store.SavedPage { return store.SavedPage{Key: []byte(k)} }
	saved(t, p, 3, page("a", "a3"), page("b", "b3"), page("c", "c3"))
	saved(t, p, 5, page("a", "a5"), gone("b"))
	saved(t, p, 8, page("d", "d8"), page("b", "b8"), gone("c"))
	saved(t, p, 9, page("a", "a9"))
	check := func(what string, oldest uint64) {
		t.Helper()
		for _, w := range []struct {
			at   uint64
			want string
		}{{3, "a=a3+ b=b3+ c=c3+ d=+"}, {5, "a=a5+ b=+ c=c3+ d=+"}, {7, "a=a5+ b=+ c=c3+ d=+"}, {8, "a=a5+ b=b8 d=d8"}, {9, "a=a9 b=b8 d=d8"}} {
			if w.at < oldest {
				continue
			}
			if got, top := as(t, p, w.at); got != w.want || top != 9 {
				t.Fatalf("%s: as of %d there is %q up to %d, want %q", what, w.at, got, top, w.want)
			}
		}
		if b, err := p.Get([]byte("a")); err != nil || string(b) != "a9" {
			t.Fatalf("%s: got %q, %v", what, b, err)
		}
		if _, err := p.Get([]byte("c")); err == nil {
			t.Fatalf("%s: a deleted page came back", what)
		}
	}
	check("at once", 0)
	p.Keep(5)
	check("after Keep", 5)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = open(t, dir)
	check("reopened", 5)
	p.Keep(8)
	if err := p.db.Flatten(1); err != nil {
		t.Fatal(err)
	}
	check("compacted", 8)
	if err := p.Wipe(); err != nil {
		t.Fatal(err)
	}
	if got, _ := as(t, p, 9); got != "" {
		t.Fatalf("wiped, but there is %q", got)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// A full file system is an error, and the database is left alone.
func TestFreeSpaceIsKept(t *testing.T) {
	p := open(t, filepath.Join(t.TempDir(), "pages"))
	p.floor = 1 << 62
	done := make(chan error, 1)
	p.Save(1, []store.SavedPage{{Key: []byte("k"), Page: []byte("v")}}, func(err error) { done <- err })
	if err := <-done; !errors.Is(err, status.NoSpace) {
		t.Fatalf("got %v", err)
	}
	p.floor = 0
	saved(t, p, 2, store.SavedPage{Key: []byte("k"), Page: []byte("v")})
	if got, _ := as(t, p, 2); got != "k=v" {
		t.Fatalf("there is %q", got)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// ownMountsEnv says that the test is in its own process, whose mounts end with it
// however it ends.
const ownMountsEnv = "CAIRN_OWN_MOUNTS"

// On a file system without a free byte pages are kept in memory, and what was
// saved before is there when there is room again. (Badger alone dies of SIGBUS.)
func TestFullFileSystem(t *testing.T) {
	if os.Getenv(ownMountsEnv) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFullFileSystem$", "-test.v")
		cmd.Env = append(os.Environ(), ownMountsEnv+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestFullFileSystem")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := unix.Mount("none", root, "tmpfs", 0, "size=96m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(root, "pages")
	p := open(t, dir)
	p.floor = 0
	saved(t, p, 1, store.SavedPage{Key: []byte("k"), Page: []byte("v")})
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(root, "filler")
	if err := os.WriteFile(filler, make([]byte, 96<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the file system is not full: %v", err)
	}
	p = open(t, dir)
	p.floor = 0
	done := make(chan error, 1)
	p.Save(2, []store.SavedPage{{Key: []byte("k"), Page: []byte("w")}}, func(err error) { done <- err })
	if err := <-done; !errors.Is(err, status.NoSpace) {
		t.Fatalf("saved on a full file system: %v", err)
	}
	if got, _ := as(t, p, 9); got != "" {
		t.Fatalf("there is %q", got)
	}
	if err := errors.Join(p.Close(), os.Remove(filler)); err != nil {
		t.Fatal(err)
	}
	p = open(t, dir)
	if got, _ := as(t, p, 1); got != "k=v" {
		t.Fatalf("there is %q", got)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// A database that cannot be opened is emptied, not an obstacle.
func TestBrokenDatabaseIsEmptied(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pages")
	p := open(t, dir)
	saved(t, p, 1, store.SavedPage{Key: []byte("k"), Page: []byte("v")})
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "db", "MANIFEST"), []byte("what?"), 0o600); err != nil {
		t.Fatal(err)
	}
	p = open(t, dir)
	if got, _ := as(t, p, 9); got != "" {
		t.Fatalf("there is %q", got)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestForeignDirectoryIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis.txt"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, status.Exists) {
		t.Fatalf("got %v", err)
	}
}

// sink takes one reply, which may come later: pages are saved in the background.
type sink chan *wire.Reply

func (s sink) Replies(rs []*wire.Reply) { s <- rs[0] }

// A store whose index does not fit into memory works over Badger, and finds
// everything again after a kill left the database behind.
func TestStoreOverBadger(t *testing.T) {
	dir := t.TempDir()
	d := disk.NewMem(64 << 20)
	if err := store.Make(d, store.Format{ID: ids.NewStoreID(), Incarnation: 1}); err != nil {
		t.Fatal(err)
	}
	for life := range 2 {
		p, err := Open(filepath.Join(dir, "spill"))
		if err != nil {
			t.Fatal(err)
		}
		s, err := store.Open(store.Config{Disk: d, BootID: "b", IndexBytes: 1, CheckpointBytes: 1 << 20, Pages: p})
		if err != nil {
			t.Fatal(err)
		}
		ask := func(q wire.Request) *wire.Reply {
			k := make(sink, 1)
			s.Submit([]*wire.Request{&q}, k)
			r := <-k
			if r.Status != status.OK {
				t.Fatalf("life %d: %s: %v", life, q.Kind, r.Err())
			}
			return r
		}
		for i := range 2000 {
			b, ver := ids.Block(i*7919%(1<<18)), ids.MakeVersion(1, uint64(i+1))
			data := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, ids.BlockSize/2)
			if life == 0 {
				ask(wire.Request{Kind: wire.Write, Volume: 1, Chunk: 1, Block: b, Count: 1, Version: ver, Data: data,
					Sums: []uint32{wire.BlockSum(1, 1, 0, b, ver, data)}})
			}
			if r := ask(wire.Request{Kind: wire.Read, Volume: 1, Chunk: 1, Block: b, Count: 1}); !bytes.Equal(r.Data, data) {
				t.Fatalf("life %d: block %d has other data", life, b)
			}
		}
		if life == 1 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.Close(); err != nil { // life 0: the store is left as a kill leaves it
			t.Fatal(err)
		}
	}
}
