package server

import (
	"errors"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/cairnstore/cairn/proto/status"
)

// A process that is started again by a supervisor does better with a listening
// socket that outlives it: a client that reconnects while there is no process
// waits in the socket's queue and is served by the next one. Without, it is
// refused and tries again by its own clock, which for QEMU is seconds.
//
// The way of passing it is systemd's (sd_listen_fds(3)): descriptors from 3 on,
// their number in LISTEN_FDS, names in LISTEN_FDNAMES.
const (
	listenFDs     = "LISTEN_FDS"
	listenNames   = "LISTEN_FDNAMES"
	listenPID     = "LISTEN_PID"
	firstListenFD = 3
)

// Inherited returns the listening socket that whoever started this process has
// given it under a name, or nil. Each can be had once.
func Inherited(name string) (net.Listener, error) {
	if pid := os.Getenv(listenPID); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return nil, nil // meant for a parent of ours
	}
	n, err := strconv.Atoi(os.Getenv(listenFDs))
	if err != nil || n < 1 {
		return nil, nil
	}
	names := strings.Split(os.Getenv(listenNames), ":")
	for i := range min(n, len(names)) {
		if names[i] != name {
			continue
		}
		names[i] = "taken"
		f := os.NewFile(uintptr(firstListenFD+i), name)
		l, err := net.FileListener(f)
		// Closing f also keeps programs started later from inheriting it.
		err = errors.Join(err, f.Close(), os.Setenv(listenNames, strings.Join(names, ":")))
		if err != nil {
			return nil, status.Errorf(status.Invalid, "the socket %q given to this process cannot be listened on: %w", name, err)
		}
		return l, nil
	}
	return nil, nil
}

// Bequeath returns what a child needs to find l under a name with Inherited: its
// descriptor, to be its fourth (exec.Cmd.ExtraFiles), and its environment.
func Bequeath(l net.Listener, name string) (*os.File, []string, error) {
	u, ok := l.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, nil, status.Errorf(status.Unsupported, "a %T cannot be given to another process", l)
	}
	f, err := u.File()
	if err != nil {
		return nil, nil, status.Errorf(status.IO, "cannot give the socket %q away: %w", name, err)
	}
	return f, []string{listenFDs + "=1", listenNames + "=" + name}, nil
}
