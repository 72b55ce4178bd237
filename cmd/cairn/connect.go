package main

import (
	"context"
	"errors"
	"net"
	"os"
	"os/user"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	metaclient "github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// cliWait bounds a command that does little.
const cliWait = 30 * time.Second

// giveUp is after how long without a metadata leader a command fails, naming
// who is missing: longer than an election.
const giveUp = 4500 * time.Millisecond

// cli is what every command of an admin knows: which cluster.
type cli struct {
	dir, meta string
}

func (c *cli) localDir() string {
	if c.dir == "" {
		return defaultDir()
	}
	return c.dir
}

// addrs are the metadata nodes of the cluster in question.
func (c *cli) addrs() ([]string, error) {
	if c.meta != "" {
		addrs := strings.Split(c.meta, ",")
		for _, a := range addrs {
			if _, _, err := net.SplitHostPort(a); err != nil {
				return nil, usagef("--meta %s: %q is not host:port; several are parted by commas (10.0.0.1:7100,10.0.0.2:7100)", c.meta, a)
			}
		}
		return addrs, nil
	}
	l, err := openCluster(c.localDir())
	if err != nil {
		return nil, err
	}
	return l.metaAddrs(), nil
}

// session is a command's way to the cluster.
type session struct {
	meta *metaclient.Client
	dir  string // of a local cluster; for error texts
}

// connect opens a session; the caller closes it.
func (c *cli) connect() (*session, error) {
	addrs, err := c.addrs()
	if err != nil {
		return nil, err
	}
	if c.meta == "" {
		// A local cluster that is down is told at once, not by a timeout.
		pid, err := readPid(pidFile(c.localDir(), "up"))
		if err != nil {
			return nil, err
		}
		if pid == 0 || !isCairn(pid) {
			return nil, status.Errorf(status.Unavailable, "the cluster in %s is not up: `cairn up --dir %s` starts it", c.localDir(), c.localDir())
		}
	}
	return &session{meta: metaclient.New(metaclient.Config{Addrs: addrs, Who: who(), GiveUp: giveUp}), dir: c.localDir()}, nil
}

// who names the person for the event log.
func who() string {
	name := "unknown"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		name += "@" + h
	}
	return name
}

// with runs f with a session and a deadline.
func (c *cli) with(ctx context.Context, wait time.Duration, f func(ctx context.Context, s *session) error) (err error) {
	s, err := c.connect()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.meta.Close()) }()
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	return f(ctx, s)
}

// volume reads one volume.
func (s *session) volume(ctx context.Context, name string) (*pb.Volume, error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volume{Volume: name}})
	if err != nil {
		return nil, err
	}
	if len(rep.Volumes) != 1 {
		return nil, status.Errorf(status.NotFound, "there is no volume %q: `cairn volume ls` lists them", name)
	}
	return rep.Volumes[0], nil
}

func (s *session) hosts(ctx context.Context) ([]*pb.HostState, error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Hosts{Hosts: true}})
	if err != nil {
		return nil, err
	}
	return rep.Hosts, nil
}

// downWait bounds the wait for a host that is known to be down.
const downWait = 3 * time.Second

// onHost asks one host's process.
func onHost[R any](ctx context.Context, s *session, host string, ask func(context.Context, pb.HostControlClient) (R, error)) (r R, err error) {
	hosts, err := s.hosts(ctx)
	if err != nil {
		return r, err
	}
	for _, h := range hosts {
		if h.Host.Name != host {
			continue
		}
		if h.Up {
			return callHost(ctx, h.Host, ask)
		}
		ctx, cancel := context.WithTimeout(ctx, downWait) // it may answer though its heartbeats do not get through
		defer cancel()
		r, err = callHost(ctx, h.Host, ask)
		if k := status.Of(err); k == status.Unavailable || k == status.Timeout {
			return r, status.Errorf(status.Unavailable, "host %s is %s, and does not answer at %s: `cairn status` says what that means", host, seen(viewHost(h)), h.Host.ControlAddr)
		}
		return r, err
	}
	return r, status.Errorf(status.NotFound, "there is no host %q: `cairn host ls` lists them", host)
}

// callHost makes one call to a host whose address is known.
func callHost[R any](ctx context.Context, h *pb.Host, ask func(context.Context, pb.HostControlClient) (R, error)) (r R, err error) {
	conn, err := dialHost(h)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	return askHost(ctx, h, conn, ask)
}

// dialHost is for more than one call; it connects at the first.
func dialHost(h *pb.Host) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+h.ControlAddr, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

func askHost[R any](ctx context.Context, h *pb.Host, conn *grpc.ClientConn, ask func(context.Context, pb.HostControlClient) (R, error)) (R, error) {
	r, err := ask(ctx, pb.NewHostControlClient(conn))
	switch k := status.Of(err); k {
	case status.Unavailable:
		return r, status.Errorf(k, "host %s at %s does not answer: is it up?", h.Name, h.ControlAddr)
	case status.Timeout:
		return r, status.Errorf(k, "host %s at %s has not answered in time: its process may hang, and `cairn status` says what is known of it", h.Name, h.ControlAddr)
	}
	return r, err
}

// hostDone turns a host's answer into an error.
func hostDone(r *pb.HostReply, err error) error {
	if err != nil {
		return err
	}
	return status.New(status.Kind(r.Status), r.Detail)
}
