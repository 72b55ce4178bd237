package disk

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// run runs a command that has to pass.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice makes a block device of size bytes. It takes root, which the quick
// tests of every day do without.
func loopDevice(t *testing.T, size int64) string { return loopOf(t, size, 512) }

// loopOf is loopDevice with sectors of a size. The device goes with this process,
// however it ends: detaching one that is open means when it is closed.
func loopOf(t *testing.T, size int64, sector int) string {
	t.Helper()
	if testing.Short() {
		t.Skip("a block device: not in the short tests")
	}
	img := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(img, nil, 0o600), os.Truncate(img, size))
	dev := run(t, "losetup", "-f", "--show", "--sector-size", strconv.Itoa(sector), img)
	f, err := os.Open(dev)
	run(t, "losetup", "-d", dev)
	must(t, err)
	t.Cleanup(func() { must(t, f.Close()) })
	return dev
}

// ownMountsEnv says that the test is in a process of its own.
const ownMountsEnv = "CAIRN_OWN_MOUNTS"

// ownMounts runs the test again in a process of its own, whose mounts end with it
// however it ends, and reports whether this is that process.
func ownMounts(t *testing.T) bool {
	t.Helper()
	if testing.Short() {
		t.Skip("mounts: not in the short tests")
	}
	if os.Getenv(ownMountsEnv) != "" {
		must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), ownMountsEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // it dies with this thread
	defer runtime.UnlockOSThread()
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// mounted makes a small file system of a kind and returns where it is.
func mounted(t *testing.T, kind string, size int64) string {
	t.Helper()
	dev := loopDevice(t, size)
	run(t, "mkfs."+kind, "-q", dev)
	dir := t.TempDir()
	run(t, "mount", dev, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	return dir
}

// fillUp leaves no byte of a file system to anybody.
func fillUp(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	must(t, err)
	for n := 1 << 20; n >= 512; {
		if _, err := f.Write(make([]byte, n)); errors.Is(err, syscall.ENOSPC) {
			n /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	must(t, f.Close())
}

// roundTrip writes, syncs, discards and reads through both ways.
func roundTrip(t *testing.T, d *File) {
	t.Helper()
	want := Aligned(8 * Align)
	for i := range want {
		want[i] = byte(i/Align + i)
	}
	for _, direct := range []bool{false, true} {
		off := int64(1 << 20)
		if direct {
			off *= 2
		}
		must(t, do(d, &Op{Kind: Write, Direct: direct, Off: off, Bufs: [][]byte{want[:Align], want[Align:]}}), SyncAll(d))
		for _, back := range []bool{false, true} {
			got := Aligned(len(want))
			must(t, do(d, &Op{Kind: Read, Direct: back, Off: off, Bufs: [][]byte{got}}))
			if !bytes.Equal(got, want) {
				t.Fatalf("written direct=%v, read direct=%v: other bytes", direct, back)
			}
		}
		odd := make([]byte, 100) // not aligned: the same bytes by the other way
		must(t, do(d, &Op{Kind: Read, Direct: true, Off: off + 5, Bufs: [][]byte{odd}}))
		if !bytes.Equal(odd, want[5:105]) {
			t.Fatal("an odd read gives other bytes")
		}
	}
	must(t, AllocateAt(d, 0, 1<<20))
	for _, op := range []*Op{{Kind: Write, Off: d.Size() - 1, Bufs: [][]byte{want[:2]}}, {Kind: Discard, Off: -1, Len: 2}, {Kind: Read, Off: 1 << 62, Len: 1 << 62}} {
		if err := do(d, op); status.Of(err) != status.Invalid {
			t.Errorf("%s beyond the disk: %v", op.Kind, err)
		}
	}
}

func discard(d Disk, off, n int64) error { return do(d, &Op{Kind: Discard, Off: off, Len: n}) }

func TestBlockDevice(t *testing.T) {
	if !ownMounts(t) {
		return
	}
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprintf("sectors of %d", sector), func(t *testing.T) { blockDevice(t, loopOf(t, 16<<20, sector)) })
	}
}

func blockDevice(t *testing.T, dev string) {
	d, err := Open(dev)
	must(t, err)
	if !d.Device() || !d.HasDirect() || d.Size() != 16<<20 {
		t.Fatalf("device %v, direct %v, %d bytes", d.Device(), d.HasDirect(), d.Size())
	}
	roundTrip(t, d)
	must(t, d.Reserve(), discard(d, 1<<20, 1<<20))
	if b := content(t, d, 1<<20, Align); !bytes.Equal(b, make([]byte, Align)) {
		t.Fatal("discarded bytes of a loop device are not zeros")
	}
	if b := content(t, d, 2<<20+Align, 2); b[0] != 1 {
		t.Fatal("the discard took more than it should")
	}
	if _, err := Open(dev); status.Of(err) != status.Held {
		t.Fatalf("opened twice: %v", err)
	}
	must(t, d.Close())
	run(t, "mkfs.ext4", "-q", dev)
	dir := t.TempDir()
	run(t, "mount", dev, dir)
	_, err = Open(dev)
	run(t, "umount", dir)
	if status.Of(err) != status.Held {
		t.Fatalf("a mounted device was opened: %v", err)
	}
}

// A file that is extended keeps what it holds; where there is no room for the
// new part it stays as it was.
func TestExtend(t *testing.T) {
	if !ownMounts(t) {
		return
	}
	dir := mounted(t, "ext4", 64<<20)
	for _, reserve := range []bool{true, false} {
		path := filepath.Join(dir, fmt.Sprint(reserve))
		d, err := Create(path, 1<<20)
		must(t, err)
		if reserve {
			must(t, d.Reserve())
		}
		must(t, WriteAt(d, []byte("here"), 1<<20-4), d.Extend(8<<20, reserve), WriteAt(d, []byte("there"), 8<<20-5))
		if got := content(t, d, 1<<20-4, 4); string(got) != "here" || d.Size() != 8<<20 {
			t.Fatalf("%q in %d bytes", got, d.Size())
		}
		if err := d.Extend(1<<20, reserve); status.Of(err) != status.Invalid {
			t.Errorf("made shorter: %v", err)
		}
		if err := d.Extend(1<<30, true); status.Of(err) != status.NoSpace {
			t.Errorf("extended beyond its file system: %v", err)
		}
		must(t, d.Close())
		st, err := os.Stat(path)
		must(t, err)
		if used := st.Sys().(*syscall.Stat_t).Blocks * 512; st.Size() != 8<<20 || (used >= 8<<20) != reserve {
			t.Errorf("reserve %v: %d bytes, %d of them taken up", reserve, st.Size(), used)
		}
	}
}

// A reserved file takes writes when its file system is full; a thin one does
// not, says so with NoSpace before anything is written, and goes on once there
// is room.
func TestFullFileSystem(t *testing.T) {
	if !ownMounts(t) {
		return
	}
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			dir := mounted(t, kind, 320<<20) // XFS wants 300 MiB at least
			const size = 32 << 20
			kept, err := Create(filepath.Join(dir, "kept"), size)
			must(t, err, kept.Reserve())
			thin, err := Create(filepath.Join(dir, "thin"), size)
			must(t, err, AllocateAt(thin, 0, 4<<20))
			fillUp(t, dir)
			if err := AllocateAt(thin, 8<<20, 4<<20); status.Of(err) != status.NoSpace {
				t.Fatalf("allocated on a full file system: %v", err)
			}
			if big, err := Create(filepath.Join(dir, "big"), size); err == nil {
				if err := big.Reserve(); status.Of(err) != status.NoSpace {
					t.Fatalf("reserved on a full file system: %v", err)
				}
				must(t, big.Close())
			} else if !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
			block := Aligned(256 << 10)
			for i := range block {
				block[i] = byte(i)
			}
			for off := int64(0); off < size; off += int64(len(block)) { // every extent, by both ways
				must(t, do(kept, &Op{Kind: Write, Direct: off%(512<<10) == 0, Off: off, Bufs: [][]byte{block}}))
				if off < 4<<20 {
					must(t, WriteAt(thin, block, off))
				}
			}
			must(t, SyncAll(kept), SyncAll(thin))
			if err := discard(kept, 0, size); !errors.Is(err, syscall.EOPNOTSUPP) {
				t.Fatalf("a reserved file gives space back: %v", err)
			}
			for off := int64(0); off < size; off += int64(len(block)) {
				if !bytes.Equal(content(t, kept, off, len(block)), block) {
					t.Fatalf("other bytes at %d", off)
				}
			}
			must(t, os.Remove(filepath.Join(dir, "filler")), AllocateAt(thin, 8<<20, 4<<20), WriteAt(thin, block, 8<<20), SyncAll(thin), discard(thin, 0, 4<<20))
			must(t, kept.Close(), thin.Close())
		})
	}
}

// A file system without a way around the page cache (or a disk that has it)
// holds the same bytes.
func TestFileRoundTrip(t *testing.T) {
	if !ownMounts(t) {
		return
	}
	dir := t.TempDir()
	shm := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "none", shm)
	t.Cleanup(func() { run(t, "umount", shm) })
	for _, dir := range []string{dir, shm} {
		d, err := Create(filepath.Join(dir, "store"), 8<<20)
		must(t, err)
		roundTrip(t, d)
		must(t, discard(d, 1<<20, 1<<20))
		if b := content(t, d, 1<<20, Align); !bytes.Equal(b, make([]byte, Align)) {
			t.Fatal("punched bytes are not zeros")
		}
		must(t, d.Close())
		if err := WriteAt(d, []byte{1}, 0); status.Of(err) != status.Unavailable {
			t.Fatalf("a closed disk: %v", err)
		}
	}
	if _, err := Open("/dev/null"); err == nil {
		t.Fatal("/dev/null is a disk")
	}
}

// More operations than a lane holds are refused, not kept: the disk hangs, and
// memory does not grow.
func TestLanesAreBounded(t *testing.T) {
	k := &hungKernel{release: make(chan struct{})}
	d, err := create(k, filepath.Join(t.TempDir(), "store"), 1<<20)
	must(t, err)
	for _, kind := range []Kind{Read, Write, Sync} {
		var mu sync.Mutex
		refused, done := 0, 0
		n := maxQueued[laneOf[kind]] + width[laneOf[kind]] + 100
		for range n {
			d.Submit(&Op{Kind: kind, Bufs: [][]byte{make([]byte, 1)}, Done: func(err error) {
				mu.Lock()
				defer mu.Unlock()
				if status.Of(err) == status.Unavailable {
					refused++
				} else if err == nil {
					done++
				}
			}})
		}
		mu.Lock()
		if refused < 100 || done > 0 {
			t.Errorf("%s: %d of %d refused, %d done while the disk hung", kind, refused, n, done)
		}
		mu.Unlock()
	}
	close(k.release)
	must(t, d.Close())
}

// hungKernel answers no transfer until it is released.
type hungKernel struct {
	linux
	release chan struct{}
}

func (k *hungKernel) read(fd int, b [][]byte, off int64) (int, error) {
	<-k.release
	return k.linux.read(fd, b, off)
}
func (k *hungKernel) write(fd int, b [][]byte, off int64) (int, error) {
	<-k.release
	return k.linux.write(fd, b, off)
}
func (k *hungKernel) fdatasync(fd int) error { <-k.release; return k.linux.fdatasync(fd) }

// oneHangs hangs in one kind of call only.
type oneHangs struct {
	linux
	kind    Kind
	release chan struct{}
}

func (k *oneHangs) hang(kind Kind) {
	if kind == k.kind {
		<-k.release
	}
}
func (k *oneHangs) read(fd int, b [][]byte, off int64) (int, error) {
	k.hang(Read)
	return k.linux.read(fd, b, off)
}
func (k *oneHangs) write(fd int, b [][]byte, off int64) (int, error) {
	k.hang(Write)
	return k.linux.write(fd, b, off)
}
func (k *oneHangs) fdatasync(fd int) error { k.hang(Sync); return k.linux.fdatasync(fd) }
func (k *oneHangs) punch(fd int, off, n int64) error {
	k.hang(Discard)
	return k.linux.punch(fd, off, n)
}

// A disk that hangs in one kind of call answers the other kinds: the hung ones
// are completions that come late, and all of them come.
func TestOneKindHangs(t *testing.T) {
	for _, hung := range []Kind{Read, Write, Sync, Discard} {
		k := &oneHangs{kind: hung, release: make(chan struct{})}
		d, err := create(k, filepath.Join(t.TempDir(), "store"), 1<<20)
		must(t, err)
		late := make(chan error, 100)
		for range cap(late) {
			op := &Op{Kind: hung, Done: func(err error) { late <- err }}
			if hung == Read || hung == Write {
				op.Bufs = [][]byte{make([]byte, 512)}
			} else if hung == Discard {
				op.Len = 4096
			}
			d.Submit(op)
		}
		for _, kind := range []Kind{Read, Write, Sync, Discard} {
			if kind == hung {
				continue
			}
			op := &Op{Kind: kind}
			if kind == Discard {
				op.Len = 4096
			}
			must(t, do(d, op)) // would not come back
		}
		if n := len(late); n > 0 {
			t.Errorf("%s: %d were answered while the disk hung", hung, n)
		}
		close(k.release)
		for range cap(late) {
			must(t, <-late)
		}
		must(t, d.Close())
	}
}

// brokenKernel fails its n-th call with EIO and notes from where it was made.
type brokenKernel struct {
	mu    sync.Mutex
	calls int
	fail  int
	sites map[string]bool // failed ones, file:line
	worse bool            // and every close and remove after it
	short bool            // transfers move one byte at a time
}

func (k *brokenKernel) broken() error { return k.count(false) }

func (k *brokenKernel) count(cleanup bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.calls++; k.calls != k.fail && !(cleanup && k.worse && k.calls > k.fail) {
		return nil
	}
	for skip := 2; ; skip++ {
		pc, file, line, ok := runtime.Caller(skip)
		if !ok {
			return syscall.EIO
		}
		if base := filepath.Base(file); base == "file.go" {
			k.sites[siteOf(runtime.FuncForPC(pc).Name(), line)] = true
			return syscall.EIO
		}
	}
}

// siteOf names a call by its line; transfers are called through a value that
// run chooses.
func siteOf(fn string, line int) string {
	if strings.HasSuffix(fn, ".transfer") {
		return "transfer"
	}
	return "file.go:" + strconv.Itoa(line)
}

func (k *brokenKernel) open(p string, fl int) (*os.File, error) {
	if err := k.broken(); err != nil {
		return nil, err
	}
	return linux{}.open(p, fl)
}
func (k *brokenKernel) lock(f *os.File) error { return errors.Join(k.broken(), linux{}.lock(f)) }
func (k *brokenKernel) size(f *os.File) (int64, bool, error) {
	if err := k.broken(); err != nil {
		return 0, false, err
	}
	return linux{}.size(f)
}
func (k *brokenKernel) truncate(f *os.File, n int64) error {
	return errors.Join(k.count(true), linux{}.truncate(f, n))
}
func (k *brokenKernel) fsync(f *os.File) error { return errors.Join(k.broken(), linux{}.fsync(f)) }
func (k *brokenKernel) remove(p string) error  { return errors.Join(k.count(true), linux{}.remove(p)) }
func (k *brokenKernel) close(f *os.File) error { return errors.Join(k.count(true), linux{}.close(f)) }
func (k *brokenKernel) read(fd int, b [][]byte, off int64) (int, error) {
	return k.transfer(fd, b, off, linux{}.read)
}
func (k *brokenKernel) write(fd int, b [][]byte, off int64) (int, error) {
	return k.transfer(fd, b, off, linux{}.write)
}
func (k *brokenKernel) transfer(fd int, b [][]byte, off int64, call func(int, [][]byte, int64) (int, error)) (int, error) {
	if err := k.broken(); err != nil {
		return 0, err
	}
	if k.short {
		return call(fd, [][]byte{b[0][:1]}, off)
	}
	return call(fd, b, off)
}
func (k *brokenKernel) fdatasync(fd int) error { return errors.Join(k.broken(), linux{}.fdatasync(fd)) }
func (k *brokenKernel) allocate(fd int, off, n int64) error {
	return errors.Join(k.broken(), linux{}.allocate(fd, off, n))
}
func (k *brokenKernel) punch(fd int, off, n int64) error {
	return errors.Join(k.broken(), linux{}.punch(fd, off, n))
}
func (k *brokenKernel) blkdiscard(fd int, off, n int64) error {
	return errors.Join(k.broken(), linux{}.blkdiscard(fd, off, n))
}

// whole uses everything a File has; its error is the first that came.
func whole(k *brokenKernel, path, dev string) error {
	d, err := create(k, path, 1<<20)
	if err != nil {
		return err
	}
	b := Aligned(Align)
	errs := []error{WriteAt(d, b[:2], 0), do(d, &Op{Kind: Write, Direct: true, Bufs: [][]byte{b}}), ReadAt(d, b[:2], 0), SyncAll(d), discard(d, 0, Align), AllocateAt(d, 0, Align), d.Reserve(), d.Extend(1<<20+Align, true), d.Close()}
	if d, err = open(k, path); err == nil {
		errs = append(errs, d.Close())
	}
	errs = append(errs, err)
	if d, err = open(k, dev); err == nil {
		errs = append(errs, discard(d, 0, Align), d.Close())
	}
	return errors.Join(append(errs, err)...)
}

// Every call to the system, from every line that makes one, has failed once:
// the failure came out as an error, and no file stayed open or half made.
func TestEverySystemCallHasFailed(t *testing.T) {
	dir, dev := t.TempDir(), loopDevice(t, 1<<20)
	sites := map[string]bool{}
	for n := 1; ; n++ {
		k := &brokenKernel{fail: n, sites: sites}
		path := filepath.Join(dir, "store")
		err := whole(k, path, dev)
		if k.calls < n {
			must(t, err)
			break
		}
		if !errors.Is(err, syscall.EIO) {
			t.Fatalf("call %d failed and nobody was told: %v", n, err)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	// What only cleans up after a failure fails beside it.
	for n := 1; n < 10; n++ {
		d, err := create(&brokenKernel{fail: n, sites: sites, worse: true}, filepath.Join(dir, "store"), 1<<20)
		if err == nil {
			err = d.Close()
		}
		if err := os.Remove(filepath.Join(dir, "store")); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if n < 9 && !errors.Is(err, syscall.EIO) {
			t.Fatalf("call %d failed and nobody was told: %v", n, err)
		}
	}
	for n := 1; ; n++ {
		path := filepath.Join(dir, "extended")
		d, err := Create(path, 1<<20)
		must(t, err)
		k := &brokenKernel{fail: n, sites: sites, worse: true}
		d.k = k
		err = d.Extend(2<<20, true)
		calls := k.calls
		k.fail, k.worse = 0, false
		must(t, d.Close(), os.Remove(path))
		if calls < n {
			must(t, err)
			break
		}
		if !errors.Is(err, syscall.EIO) {
			t.Fatalf("call %d of extending a file failed and nobody was told: %v", n, err)
		}
	}
	var missing []string
	all := callSites(t, "file.go")
	for _, s := range all {
		if !sites[s] {
			missing = append(missing, s)
		}
	}
	t.Logf("system calls of a File: %d of %d have failed", len(all)-len(missing), len(all))
	if len(missing) > 0 {
		t.Fatalf("never failed: %v", missing)
	}
}

// callSites lists the lines of a file that call the kernel, and holds it to
// calling nothing of the system that can fail but through it.
func callSites(t *testing.T, name string) []string {
	t.Helper()
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, name, nil, 0)
	must(t, err)
	var out []string
	ast.Inspect(f, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		switch x := sel.X.(type) {
		case *ast.Ident:
			if x.Name == "k" {
				out = append(out, "file.go:"+strconv.Itoa(fset.Position(call.Pos()).Line))
			}
			if x.Name == "os" || x.Name == "unix" && sel.Sel.Name != "Preadv2" { // ReadNow may fail: the read is then done the long way
				t.Errorf("%s: %s.%s is called past the kernel", fset.Position(call.Pos()), x.Name, sel.Sel.Name)
			}
		case *ast.SelectorExpr:
			if x.Sel.Name == "k" {
				out = append(out, "file.go:"+strconv.Itoa(fset.Position(call.Pos()).Line))
			}
		}
		return true
	})
	out = append(out, "transfer")
	slices.Sort(out)
	return slices.Compact(out)
}

// Transfers of one byte at a time move every byte.
func TestShortTransfers(t *testing.T) {
	d, err := create(&brokenKernel{short: true}, filepath.Join(t.TempDir(), "store"), 1<<20)
	must(t, err)
	want := []byte("not all at once, but all of it")
	bufs := [][]byte{want[:7], want[7:8], want[8:]}
	must(t, do(d, &Op{Kind: Write, Off: 77, Bufs: bufs}))
	if len(bufs[0]) != 7 {
		t.Fatal("the caller's buffers were changed")
	}
	if got := content(t, d, 77, len(want)); !bytes.Equal(got, want) {
		t.Fatalf("%q", got)
	}
	must(t, d.Close())
}
