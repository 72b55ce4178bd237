package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// plant writes somebody's lock.
func plant(t *testing.T, b Bucket, h holder) {
	t.Helper()
	raw, err := json.Marshal(&h)
	if err == nil {
		err = b.Put(context.Background(), "locks/theirs", raw)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// endedPid is of a process that was.
func endedPid(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

// A lock is respected while its holder lives, here or elsewhere, and says who that
// is; it is removed when the holder is dead, or when told to.
func TestLocks(t *testing.T) {
	ctx := context.Background()
	recent, old := time.Now().Add(-lockStale/2).UnixNano(), time.Now().Add(-2*lockStale).UnixNano()
	theirs := func(volume, machine string, pid int, seen int64) holder {
		return holder{Volume: volume, Who: "eve@elsewhere", Machine: machine, Pid: pid, SinceUnixNs: old, SeenUnixNs: seen}
	}
	for _, c := range []struct {
		what   string
		is     holder
		volume string // that is to be locked
		held   bool
	}{
		{"a process that lives", theirs("v", machine(), os.Getpid(), recent), "v", true},
		{"a process that lives and was stopped for long", theirs("v", machine(), os.Getpid(), old), "v", true},
		{"a process that was killed", theirs("v", machine(), endedPid(t), recent), "v", false},
		{"another machine's", theirs("v", "other", 1, recent), "v", true},
		{"another machine's that was not seen for long", theirs("v", "other", 1, old), "v", false},
		{"another volume's", theirs("w", "other", 1, recent), "v", false},
		{"a removal", theirs("", "other", 1, recent), "v", true},
		{"a backup, for a removal", theirs("w", "other", 1, recent), "", true},
	} {
		r := &Repo{newMemory()}
		plant(t, r.b, c.is)
		_, l, err := r.Lock(ctx, c.volume, "me@here", false)
		if c.held {
			if status.Of(err) != status.Held || !strings.Contains(err.Error(), "eve@elsewhere, process") || !strings.Contains(err.Error(), "--break-lock") {
				t.Errorf("%s: %v", c.what, err)
			}
			if names := r.b.(*memory).objects; len(names) != 1 {
				t.Errorf("%s: a refused lock leaves %d locks", c.what, len(names))
			}
			if _, l, err = r.Lock(ctx, c.volume, "me@here", true); err != nil || len(l.Broken) != 1 {
				t.Fatalf("%s, to be broken: %v", c.what, err)
			}
		} else if err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		if err := l.Unlock(); err != nil {
			t.Fatal(err)
		}
		left := 0
		if c.is.Volume == "w" && c.volume == "v" {
			left = 1
		}
		if names := r.b.(*memory).objects; len(names) != left {
			t.Errorf("%s: after the end %d locks are left", c.what, len(names))
		}
	}
	r := &Repo{newMemory()}
	if err := r.b.Put(ctx, "locks/x", []byte("{")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Lock(ctx, "v", "me", false); status.Of(err) != status.Corrupt || !strings.Contains(err.Error(), "locks/x") {
		t.Errorf("a damaged lock: %v", err)
	}
}

// Of many that come at once at most one holds the lock at a time; one whose lock is
// broken learns it.
func TestLockHoldsOne(t *testing.T) {
	ctx := context.Background()
	r := &Repo{newMemory()}
	var mu sync.Mutex
	holds := 0
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			_, l, err := r.Lock(ctx, "v", "me", false)
			if status.Of(err) == status.Held {
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			if holds++; holds > 1 {
				t.Error("two hold it")
			}
			mu.Unlock()
			mu.Lock()
			holds--
			mu.Unlock()
			if err := l.Unlock(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	held, l, err := r.Lock(ctx, "v", "me", false)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.refresh(held); err != nil {
		t.Fatalf("a lock that is there: %v", err)
	}
	if _, _, err := r.Lock(ctx, "v", "you", true); err != nil {
		t.Fatal(err)
	}
	if err := l.refresh(held); status.Of(err) != status.Held {
		t.Fatalf("a lock that was broken: %v", err)
	}
	if err := l.Unlock(); err != nil || held.Err() == nil {
		t.Fatalf("after the end: %v, %v", err, held.Err())
	}
}

// What a killed process was writing goes with the next backup; what another process
// writes now stays, and none of it is an object.
func TestHalfWrittenFilesGo(t *testing.T) {
	path := t.TempDir()
	dir, err := OpenDir(path, true)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if err := dir.Put(ctx, "data/ab/x", []byte("x")); err != nil {
		t.Fatal(err)
	}
	name := func(pid int, owner string) string {
		return filepath.Join(path, tempDir, fmt.Sprintf("%s%d-1", owner, pid))
	}
	killed, lives, far, gone := name(endedPid(t), tempOwner()), name(os.Getpid(), tempOwner()), name(1, "elsewhere-"), name(2, "elsewhere-")
	for _, f := range []string{killed, lives, far, gone} {
		if err := os.WriteFile(f, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	long := time.Now().Add(-2 * tempStale)
	if err := os.Chtimes(gone, long, long); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDir(path, false); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(killed); err != nil {
		t.Fatalf("who only reads has removed a file: %v", err)
	}
	if dir, err = OpenDir(path, true); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		file  string
		stays bool
	}{{killed, false}, {lives, true}, {far, true}, {gone, false}} {
		if _, err := os.Stat(c.file); (err == nil) != c.stays || err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v, is to stay: %v", c.file, err, c.stays)
		}
	}
	var names []string
	if err := dir.List(ctx, "", func(n string) error { names = append(names, n); return nil }); err != nil || len(names) != 1 {
		t.Fatalf("objects: %v, %v", names, err)
	}
}
