package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cairnstore/cairn/chaos/cluster"
)

// side is one of the servers compared.
type side interface {
	label() string
	uri() string
	pids() ([]int, error)
	close() error
}

// startMaxWait bounds the wait for a server's socket.
const startMaxWait = 10 * time.Second

// program is a server of somebody else's.
type program struct {
	name string
	at   string // its export's URI
	cmd  *exec.Cmd
	gone chan struct{} // closed when it ended
}

// startQemu starts the reference: qemu-nbd with its defaults on a raw file.
func startQemu(ctx context.Context, dir string, sizeBytes uint64) (*program, error) {
	raw := filepath.Join(dir, "disk.raw")
	f, err := os.Create(raw)
	if err != nil {
		return nil, fmt.Errorf("the reference's raw file: %w", err)
	}
	if err := errors.Join(f.Truncate(int64(sizeBytes)), f.Close()); err != nil {
		return nil, fmt.Errorf("the reference's raw file: %w", err)
	}
	socket := filepath.Join(dir, "qemu.sock")
	return startExport(ctx, "qemu-nbd, one raw file", socket,
		"qemu-nbd", "--format=raw", "--persistent", "--shared=8", "--export-name=v", "--socket="+socket, raw)
}

// startExport runs an NBD server that exports v at a unix socket.
func startExport(ctx context.Context, name, socket string, argv ...string) (*program, error) {
	q, err := startProgram(ctx, name, "unix", socket, argv...)
	if err == nil {
		q.at = "nbd+unix:///v?socket=" + socket
	}
	return q, err
}

// startProgram runs a server until close, and returns once it accepts there.
func startProgram(ctx context.Context, name, network, addr string, argv ...string) (*program, error) {
	q := &program{name: name, gone: make(chan struct{})}
	q.cmd = exec.Command(argv[0], argv[1:]...)
	var said strings.Builder
	q.cmd.Stderr = &said
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C reaches us alone, and we stop it
	if err := q.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s does not start: %w", argv[0], err)
	}
	var ended error
	go func() {
		ended = q.cmd.Wait()
		close(q.gone)
	}()
	ctx, cancel := context.WithTimeout(ctx, startMaxWait)
	defer cancel()
	for {
		c, err := net.Dial(network, addr)
		if err == nil {
			return q, c.Close()
		}
		select {
		case <-q.gone:
			return nil, fmt.Errorf("%s ended at once: %w: %s", argv[0], ended, said.String())
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("%s does not serve: %w", argv[0], err), q.close())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (q *program) label() string        { return q.name }
func (q *program) uri() string          { return q.at }
func (q *program) pids() ([]int, error) { return []int{q.cmd.Process.Pid}, nil }

func (q *program) close() error {
	if err := q.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("%s cannot be stopped: %w", q.cmd.Path, err)
	}
	select {
	case <-q.gone:
		return nil
	case <-time.After(startMaxWait):
	}
	return q.kill()
}

func (q *program) kill() error {
	if err := q.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("%s cannot be killed: %w", q.cmd.Path, err)
	}
	<-q.gone
	return nil
}

// cairnSide is a cluster of three hosts with one volume of three replicas.
type cairnSide struct {
	*cluster.Cluster
	at string // the volume's URI
}

// Names of what the benchmark uses of its cluster. The volume is attached on
// its first host; victim is another one, with a replica.
const (
	volumeName  = "bench"
	gatewayHost = "host-1"
	victimHost  = "host-2"
	replicas    = 3
)

func startCairn(ctx context.Context, cfg Config, dir string) (*cairnSide, error) {
	c, err := cluster.Start(ctx, cluster.Config{Bin: cfg.Bin, Dir: dir, Hosts: replicas})
	if err != nil {
		return nil, err
	}
	s := &cairnSide{Cluster: c}
	if err := c.CreateVolume(ctx, volumeName, cfg.SizeBytes, replicas); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if s.at, err = c.Attach(ctx, volumeName, gatewayHost); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return s, nil
}

func (s *cairnSide) label() string        { return "cairn, 3 replicas" }
func (s *cairnSide) uri() string          { return s.at }
func (s *cairnSide) pids() ([]int, error) { return s.Pids() }
func (s *cairnSide) close() error         { return s.Close() }

// clockTick is the unit of utime and stime in /proc: USER_HZ, 100 on every
// architecture Go runs on.
const clockTick = 10 * time.Millisecond

// cpuOf is the processor time used so far by the processes together.
func cpuOf(pids []int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, fmt.Errorf("a measured process ended: %w", err)
		}
		t, err := statCPU(string(b))
		if err != nil {
			return 0, err
		}
		sum += t
	}
	return sum, nil
}

// statCPU reads utime + stime, fields 14 and 15 of /proc/PID/stat. The name in
// field 2 is in parentheses and may hold anything, also parentheses.
func statCPU(stat string) (time.Duration, error) {
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 13 {
		return 0, fmt.Errorf("a line of /proc/PID/stat has only %d fields", len(f)+2)
	}
	var ticks int64
	for _, field := range f[11:13] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("a time in /proc/PID/stat: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}
