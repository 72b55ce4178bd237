package fault

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// stepClock jumps to each time waited for, and ends the run after end.
type stepClock struct {
	now, end time.Duration
}

func (c *stepClock) Now() time.Duration { return c.now }

func (c *stepClock) Wait(ctx context.Context, until time.Duration) error {
	if until > c.end {
		return context.Canceled
	}
	c.now = max(c.now, until)
	return ctx.Err()
}

// fakeCluster records calls; a Pause lasts until the test's channel ends.
type fakeCluster struct {
	mu       sync.Mutex
	calls    []string
	leaders  []string         // answers of MetaLeader, in turn; "": none now
	failures map[string]error // by call
}

func (c *fakeCluster) call(format string, args ...any) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := fmt.Sprintf(format, args...)
	c.calls = append(c.calls, s)
	return c.failures[s]
}

func (c *fakeCluster) Names(kind string) []string { return names[kind] }
func (c *fakeCluster) Kill(name string) error     { return c.call("kill %s", name) }
func (c *fakeCluster) Pause(name string, d time.Duration) error {
	return c.call("pause %s %v", name, d)
}
func (c *fakeCluster) Hold(name string) error    { return c.call("hold %s", name) }
func (c *fakeCluster) Release(name string) error { return c.call("release %s", name) }
func (c *fakeCluster) MetaLeader() (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	name := c.leaders[0]
	c.leaders = c.leaders[1:]
	if name == "" {
		return "", status.Errorf(status.Unavailable, "nobody leads now")
	}
	return name, nil
}

// run runs a script on the fake and returns its calls and its record.
func run(t *testing.T, text string, end time.Duration, c *fakeCluster) (calls, record string, err error) {
	t.Helper()
	var log []string
	err = Run(context.Background(), Config{Scheduler: scheduler(t, text, 3), Cluster: c, Clock: &stepClock{end: end},
		Log: func(d Done) { log = append(log, d.String()) }})
	return strings.Join(c.calls, ", "), strings.Join(log, "\n"), err
}

func TestRunActsAndRecords(t *testing.T) {
	for _, c := range []struct {
		name, script  string
		leaders       []string
		failures      map[string]error
		calls, record string
	}{
		{"kill", "at 1s kill host-1", nil, nil, "kill host-1", "at 1s kill host-1"},
		{"the leader by name", "at 1s kill meta leader\nat 9s kill meta leader", []string{"meta-2", "meta-1"}, nil,
			"kill meta-2, kill meta-1", "at 1s kill meta-2 # the metadata leader\nat 9s kill meta-1 # the metadata leader"},
		{"no leader now", "at 1s hold meta leader 2s", []string{""}, nil, "", "# at 1s hold meta leader 2s: nobody leads now"},
		{"hold and release", "at 1s hold host-1 2s", nil, nil,
			"hold host-1, kill host-1, release host-1", "at 1s hold host-1 2s\n# at 3s release host-1"},
		{"the held leader is released, not the next one", "at 1s hold meta leader 5s\nat 2s kill meta leader", []string{"meta-3", "meta-1"}, nil,
			"hold meta-3, kill meta-3, kill meta-1, release meta-3",
			"at 1s hold meta-3 5s # the metadata leader\nat 2s kill meta-1 # the metadata leader\n# at 6s release meta-3"},
		{"holds overlap", "at 1s hold host-1 2s\nat 2s hold host-1 3s", nil, nil,
			"hold host-1, kill host-1, hold host-1, kill host-1, release host-1",
			"at 1s hold host-1 2s\nat 2s hold host-1 3s\n# at 3s release host-1: another hold goes on\n# at 5s release host-1"},
		{"the end releases", "at 1s hold host-1 5m", nil, nil, "hold host-1, kill host-1, release host-1", "at 1s hold host-1 5m0s"},
		{"pause", "at 1s pause host-3 10ms", nil, nil, "pause host-3 10ms", "at 1s pause host-3 10ms"},
		{"already down", "at 1s kill host-1\nat 2s pause host-1 1s", nil,
			map[string]error{"kill host-1": status.New(status.NotFound, "gone"), "pause host-1 1s": status.New(status.NotFound, "gone too")},
			"kill host-1, pause host-1 1s", "# at 1s kill host-1: gone\n# at 2s pause host-1 1s: gone too"},
		{"a hold of what is down still counts", "at 1s hold host-1 2s", nil, map[string]error{"kill host-1": status.New(status.NotFound, "gone")},
			"hold host-1, kill host-1, release host-1", "at 1s hold host-1 2s\n# at 3s release host-1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			calls, record, err := run(t, c.script, time.Minute, &fakeCluster{leaders: c.leaders, failures: c.failures})
			if err != nil || calls != c.calls || record != c.record {
				t.Fatalf("got %q, %v\n%s\nwant %q\n%s", calls, err, record, c.calls, c.record)
			}
			// Its record does the same again, with the leaders by name.
			if strings.Contains(c.script, "pause") || slices.Contains(c.leaders, "") || c.failures != nil {
				return
			}
			if again, _, err := run(t, record, time.Minute, &fakeCluster{}); err != nil || again != c.calls {
				t.Fatalf("the replay of\n%s\ncalled %q, %v, want %q", record, again, err, c.calls)
			}
		})
	}
}

// A cluster that cannot be acted on ends the run with its error, and what was
// held is released all the same.
func TestRunFailsLoudly(t *testing.T) {
	broken := status.New(status.Permission, "no permission")
	for _, c := range []struct{ script, fails string }{
		{"at 1s hold host-1 20s\nat 2s kill host-2", "kill host-2"},
		{"at 1s hold host-1 20s\nat 2s hold host-2 5s", "hold host-2"},
		{"at 1s hold host-1 20s", "kill host-1"},
		{"at 1s hold host-1 20s\nat 2s pause host-2 5s", "pause host-2 5s"},
		{"at 1s hold host-1 20s", "release host-1"},
	} {
		cluster := &fakeCluster{failures: map[string]error{c.fails: broken}}
		calls, _, err := run(t, c.script, 10*time.Second, cluster)
		if !errors.Is(err, status.Permission) || !strings.Contains(calls, "release host-1") {
			t.Errorf("%s fails: got %v after %s", c.fails, err, calls)
		}
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	c := &fakeCluster{}
	var n int
	err := Run(ctx, Config{Scheduler: scheduler(t, "at 0s hold host-1 10m\nevery 10ms kill host-2", 1), Cluster: c, Log: func(Done) {
		if n++; n == 3 {
			cancel()
		}
	}})
	if err != nil || n != 3 || c.calls[len(c.calls)-1] != "release host-1" {
		t.Fatalf("%d actions, %v, %v", n, err, c.calls)
	}
}

// A pause that fails ends a run that has nothing to do for an hour.
func TestAFailedPauseEndsTheRun(t *testing.T) {
	c := &fakeCluster{failures: map[string]error{"pause host-1 1s": status.New(status.Permission, "no permission")}}
	err := Run(context.Background(), Config{Scheduler: scheduler(t, "at 0s pause host-1 1s\nat 1h kill host-2", 1), Cluster: c})
	if !errors.Is(err, status.Permission) {
		t.Fatal(err)
	}
}
