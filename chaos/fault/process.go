package fault

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// dieTimeout bounds the wait for a killed process: one in an uninterruptible
// call to a hung disk dies late.
const dieTimeout = 10 * time.Second

// clockTicks is USER_HZ, the unit of start times in /proc: 100 on every Linux
// architecture Go runs on.
const clockTicks = 100

// maxPid is PID_MAX_LIMIT of 64-bit Linux.
const maxPid = 1 << 22

// Processes is a Cluster of processes on this machine, by the pid files and
// hold files that `cairn up --processes` keeps: DIR/run/NAME.pid and
// DIR/run/NAME.hold.
type Processes struct {
	Dir    string                 // the cluster's directory
	Exe    string                 // path of the program they must run; "": any
	Leader func() (string, error) // who leads the metadata service
}

var _ Cluster = Processes{}

var pidFile = regexp.MustCompile(`^([a-z]+)-[0-9]+\.pid$`)

// Names lists the pid files of a kind; nil when there are none.
func (p Processes) Names(kind string) []string {
	entries, err := os.ReadDir(filepath.Join(p.Dir, "run"))
	if err != nil {
		return nil // no cluster: a script about it is refused by NewScheduler
	}
	var names []string
	for _, e := range entries {
		if m := pidFile.FindStringSubmatch(e.Name()); m != nil && m[1] == kind {
			names = append(names, strings.TrimSuffix(e.Name(), ".pid"))
		}
	}
	slices.Sort(names)
	return names
}

// MetaLeader asks Leader.
func (p Processes) MetaLeader() (string, error) {
	if p.Leader == nil {
		return "", status.Errorf(status.Unsupported, "nothing is set up to find the metadata leader")
	}
	return p.Leader()
}

// Kill kills the process with -9 and waits until it is gone.
func (p Processes) Kill(name string) (err error) {
	fd, err := p.open(name)
	if err != nil {
		return err
	}
	defer closeFD(fd, &err)
	if err := signal(fd, name, unix.SIGKILL); err != nil {
		return err
	}
	return waitGone(fd, name)
}

// Pause stops the process and lets it go on after d. One that is killed
// meanwhile is not an error.
func (p Processes) Pause(name string, d time.Duration) (err error) {
	fd, err := p.open(name)
	if err != nil {
		return err
	}
	defer closeFD(fd, &err)
	if err := signal(fd, name, unix.SIGSTOP); err != nil {
		return err
	}
	if _, err := poll(fd, d); err != nil { // ends early when it is killed
		return errors.Join(fmt.Errorf("wait while %s is paused: %w", name, err), signal(fd, name, unix.SIGCONT))
	}
	if err := signal(fd, name, unix.SIGCONT); err != nil && !errors.Is(err, status.NotFound) {
		return err
	}
	return nil
}

// Hold makes the supervisor leave the process down once it dies.
func (p Processes) Hold(name string) error {
	if err := os.WriteFile(p.file(name, "hold"), nil, 0o644); err != nil {
		return fmt.Errorf("hold %s: %w", name, err)
	}
	return nil
}

// Release lets the supervisor start the process again.
func (p Processes) Release(name string) error {
	if err := os.Remove(p.file(name, "hold")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("release %s: %w", name, err)
	}
	return nil
}

func (p Processes) file(name, ext string) string {
	return filepath.Join(p.Dir, "run", name+"."+ext)
}

// open returns a pidfd of the process a pid file names. The kernel gives
// numbers out again, so after the descriptor pins one process it is checked to
// be the one that was meant: not younger than the file, and of the right
// program. Not running is NotFound.
func (p Processes) open(name string) (int, error) {
	text, err := os.ReadFile(p.file(name, "pid"))
	if errors.Is(err, os.ErrNotExist) {
		return -1, status.Errorf(status.NotFound, "%s is not running: it has no pid file", name)
	}
	if err != nil {
		return -1, fmt.Errorf("find %s: %w", name, err)
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(text)))
	if err != nil || pid <= 1 || pid > maxPid {
		// A supervisor that writes the file in two steps is seen between them.
		return -1, status.Errorf(status.NotFound, "%s is not running: its pid file says %q", name, text)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, status.Errorf(status.NotFound, "%s is not running: process %d is gone", name, pid)
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d of %s: %w", pid, name, err)
	}
	if err := p.check(name, pid); err != nil {
		closeFD(fd, &err)
		return -1, err
	}
	return fd, nil
}

// check refuses a process that is not the one the pid file was written for.
func (p Processes) check(name string, pid int) error {
	gone := func(why string) error {
		return status.Errorf(status.NotFound, "%s is not running: %s", name, why)
	}
	if p.Exe != "" {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			return gone(fmt.Sprintf("process %d is gone", pid))
		}
		if strings.TrimSuffix(exe, " (deleted)") != p.Exe {
			return gone(fmt.Sprintf("process %d is %s, not %s", pid, exe, p.Exe))
		}
	}
	info, err := os.Stat(p.file(name, "pid"))
	if err != nil {
		return gone("its pid file is gone")
	}
	age, err := processAge(pid)
	if err != nil {
		return gone(fmt.Sprintf("process %d is gone", pid))
	}
	if fileAge := time.Since(info.ModTime()); age+time.Second < fileAge {
		return gone(fmt.Sprintf("process %d is younger than its pid file", pid))
	}
	return nil
}

// processAge reads when a process started: field 22 of /proc/PID/stat, counted
// after the name in brackets, which may hold anything.
func processAge(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return 0, status.Errorf(status.Internal, "/proc/%d/stat has %d fields after the name", pid, len(fields))
	}
	ticks, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("start of process %d: %w", pid, err)
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, fmt.Errorf("read the boot clock: %w", err)
	}
	return time.Duration(now.Nano()) - time.Duration(ticks)*time.Second/clockTicks, nil
}

func signal(fd int, name string, sig unix.Signal) error {
	err := unix.PidfdSendSignal(fd, sig, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return status.Errorf(status.NotFound, "%s is not running: it has just gone", name)
	}
	if err != nil {
		return fmt.Errorf("send %v to %s: %w", sig, name, err)
	}
	return nil
}

func waitGone(fd int, name string) error {
	gone, err := poll(fd, dieTimeout)
	if err != nil {
		return fmt.Errorf("wait for the end of %s: %w", name, err)
	}
	if !gone {
		return status.Errorf(status.Timeout, "%s was killed but is still there after %v: see what it waits for in /proc/PID/stack", name, dieTimeout)
	}
	return nil
}

// poll waits until the process has ended, at most d.
func poll(fd int, d time.Duration) (gone bool, err error) {
	end := time.Now().Add(d)
	for {
		left := max(0, time.Until(end))
		ms := int((left + time.Millisecond - 1) / time.Millisecond)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, ms)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n > 0, err
	}
}

func closeFD(fd int, err *error) {
	if cerr := unix.Close(fd); cerr != nil {
		*err = errors.Join(*err, fmt.Errorf("close a pidfd: %w", cerr))
	}
}
