package backup

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// A lock is an object locks/ID, of a name nobody else uses: no store has to know how
// to make an object only if there is none. Who wants one writes it and then looks at
// all others: of two that come at once each sees the other, or one does.
//
// A lock ends when its holder removes it. One whose holder is dead is removed by the
// next that finds it in its way: at once if it was a process of the same machine,
// else when it was not refreshed for lockStale. A holder that finds its own lock gone
// ends its work.

const (
	lockRefresh = 30 * time.Second
	lockStale   = 10 * time.Minute
	lockTries   = 4 // of two that come at once and see each other, one gets through
)

// Lock keeps others off a volume's backups in a repository, or off all.
type Lock struct {
	Broken []string // what was said of locks that were in the way and are removed

	r      *Repo
	name   string
	is     holder
	ok     time.Time // it was there
	cancel context.CancelCauseFunc
	ended  chan struct{}
}

// holder is what a lock says.
type holder struct {
	Volume      string `json:"volume,omitempty"` // none: all of the repository
	Who         string `json:"who"`
	Machine     string `json:"machine"` // this boot of it, and its processes' namespace
	Pid         int    `json:"pid"`
	SinceUnixNs int64  `json:"sinceUnixNs"`
	SeenUnixNs  int64  `json:"seenUnixNs"` // written again and again
}

func (h *holder) String() string {
	at := func(ns int64) string { return time.Unix(0, ns).UTC().Format(time.DateTime) }
	return fmt.Sprintf("%s, process %d, since %s UTC, seen last at %s", h.Who, h.Pid, at(h.SinceUnixNs), at(h.SeenUnixNs))
}

func (h *holder) does() string {
	if h.Volume == "" {
		return "backups are being removed"
	}
	return "volume " + h.Volume + " is being backed up"
}

// dead: nobody refreshes it any more.
func (h *holder) dead(now time.Time) bool {
	if h.Machine != "" && h.Machine == machine() {
		return errors.Is(syscall.Kill(h.Pid, 0), syscall.ESRCH)
	}
	return now.Sub(time.Unix(0, h.SeenUnixNs)) > lockStale
}

// machine tells processes of this machine's boot and namespace from others; empty if
// it cannot.
func machine() string {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	space, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(boot)) + " " + space
}

// Lock locks a volume's backups for writing, or with no volume the whole repository;
// status.Held says by whom it is locked. force removes what is in the way. The
// context that is returned ends when the lock is lost; Unlock ends it too.
func (r *Repo) Lock(ctx context.Context, volume, who string, force bool) (context.Context, *Lock, error) {
	now := time.Now()
	l := &Lock{r: r, name: "locks/" + rand.Text(), ended: make(chan struct{}), ok: now,
		is: holder{Volume: volume, Who: who, Machine: machine(), Pid: os.Getpid(), SinceUnixNs: now.UnixNano()}}
	for try := 1; ; try++ {
		if err := l.put(ctx); err != nil {
			return nil, nil, err
		}
		err := l.look(ctx, force)
		if err == nil {
			break
		}
		err = errors.Join(err, r.b.Remove(ctx, l.name))
		if try == lockTries || status.Of(err) != status.Held {
			return nil, nil, err
		}
		pause, rerr := rand.Int(rand.Reader, big.NewInt(int64(250*time.Millisecond)))
		if rerr != nil {
			return nil, nil, errors.Join(err, rerr)
		}
		select {
		case <-time.After(time.Duration(pause.Int64())):
		case <-ctx.Done():
			return nil, nil, err
		}
	}
	ctx, l.cancel = context.WithCancelCause(ctx)
	go l.keep(ctx)
	return ctx, l, nil
}

func (l *Lock) put(ctx context.Context) error {
	l.is.SeenUnixNs = time.Now().UnixNano()
	raw, err := json.Marshal(&l.is)
	if err != nil {
		return err
	}
	return l.r.b.Put(ctx, l.name, append(raw, '\n'))
}

// look removes dead locks that are in the way, and reports the first living one.
func (l *Lock) look(ctx context.Context, force bool) error {
	var names []string
	if err := l.r.b.List(ctx, "locks/", func(n string) error { names = append(names, n); return nil }); err != nil {
		return err
	}
	for _, n := range names {
		if n == l.name {
			continue
		}
		raw, err := l.r.b.Get(ctx, n)
		if status.Of(err) == status.NotFound {
			continue // it has ended meanwhile
		}
		if err != nil {
			return err
		}
		var h holder
		switch bad := json.Unmarshal(raw, &h) != nil || h.Who == ""; {
		case bad && !force:
			return status.Errorf(status.Corrupt, "the lock %s/%s is damaged: if nothing is written to %s now, give the command with --break-lock", l.r.b, n, l.r.b)
		case !bad && h.Volume != "" && l.is.Volume != "" && h.Volume != l.is.Volume:
			continue
		case bad || force || h.dead(time.Now()):
			l.Broken = append(l.Broken, h.String())
			if err := l.r.b.Remove(ctx, n); err != nil {
				return err
			}
		default:
			return status.Errorf(status.Held, "%s in %s by %s: wait for its end; if it is dead, give the command with --break-lock, or wait until nothing was seen of it for %v", h.does(), l.r.b, &h, lockStale)
		}
	}
	return nil
}

// keep refreshes the lock until Unlock, or until it is lost.
func (l *Lock) keep(ctx context.Context) {
	defer close(l.ended)
	t := time.NewTicker(lockRefresh)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := l.refresh(ctx); err != nil {
				l.cancel(err)
			}
		}
	}
}

// refresh says that the holder lives; an error: it has lost the lock. A repository
// that does not answer for a while is no loss.
func (l *Lock) refresh(ctx context.Context) error {
	has, err := l.r.b.Has(ctx, l.name)
	if err == nil && !has {
		return status.Errorf(status.Held, "the lock %s/%s of this command was broken by somebody: it ends here", l.r.b, l.name)
	}
	if err == nil {
		err = l.put(ctx)
	}
	if err == nil {
		l.ok = time.Now()
	} else if time.Since(l.ok) > lockStale/2 {
		return fmt.Errorf("the lock of this command cannot be kept: %w", err)
	}
	return nil
}

// Unlock ends the lock.
func (l *Lock) Unlock() error {
	l.cancel(nil)
	<-l.ended
	ctx, cancel := context.WithTimeout(context.Background(), lockRefresh)
	defer cancel()
	return l.r.b.Remove(ctx, l.name)
}
