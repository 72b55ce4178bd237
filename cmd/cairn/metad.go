package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/placement/driver"
	"github.com/cairnstore/cairn/proto/status"
)

// metad is one running metadata node. A node that ends because it is in doubt is
// started again, which mends it.
type metad struct {
	cfg     *metaConfig
	log     *slog.Logger
	metrics *metrics      // nil: none
	done    chan struct{} // closed when the node has ended for good

	mu     sync.Mutex // guards both below
	srv    *server.Server
	closed bool
}

func startMeta(cfg *metaConfig, log *slog.Logger) (*metad, error) {
	m := &metad{cfg: cfg, log: log, done: make(chan struct{})}
	srv, err := m.open()
	if err != nil {
		return nil, err
	}
	m.srv = srv
	if cfg.Metrics != "" {
		if m.metrics, err = serveMetrics(cfg.Metrics, metaMetrics(m), log); err != nil {
			return nil, errors.Join(err, srv.Close())
		}
	}
	go m.watch()
	return m, nil
}

// open starts the node once.
func (m *metad) open() (*server.Server, error) {
	raftL, err := listenPatiently(link.Config{Addr: m.cfg.Raft})
	if err != nil {
		return nil, err
	}
	apiL, err := listenPatiently(link.Config{Addr: m.cfg.API})
	if err != nil {
		return nil, errors.Join(err, raftL.Close())
	}
	sc := m.cfg.server()
	sc.RaftListener, sc.APIListener, sc.Placer, sc.Log = raftL, apiL, driver.New(), m.log
	srv, err := server.New(sc)
	if err != nil {
		return nil, errors.Join(err, ignoreClosed(raftL.Close()), ignoreClosed(apiL.Close()))
	}
	return srv, nil
}

// healings bounds how often a node mends itself in one process.
const healings = 3

// watch starts the node again after it has found itself in doubt.
func (m *metad) watch() {
	defer close(m.done)
	for range healings {
		srv := m.server()
		<-srv.Done()
		if !server.Heals(srv.Err()) {
			return
		}
		if err := srv.Close(); err != nil {
			m.log.Warn("closing a metadata node in doubt", "err", err)
		}
		m.mu.Lock()
		if m.closed {
			m.mu.Unlock()
			return
		}
		fresh, err := m.open()
		if err == nil {
			m.srv = fresh
		}
		m.mu.Unlock()
		if err != nil {
			m.log.Error("the metadata node cannot be started again", "err", err)
			return
		}
	}
	<-m.server().Done()
}

func (m *metad) server() *server.Server {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.srv
}

func (m *metad) close() error {
	m.mu.Lock()
	m.closed = true
	srv := m.srv
	m.mu.Unlock()
	err := srv.Close()
	<-m.done
	return errors.Join(err, m.metrics.close())
}

// server is the node without what runs it.
func (c *metaConfig) server() server.Config {
	sc := server.Config{ID: c.ID, Cluster: c.Cluster, Dir: c.Dir, Join: c.Join, Timeout: time.Duration(c.TimeoutMs) * time.Millisecond, Program: program()}
	for _, p := range c.Peers {
		sc.Peers = append(sc.Peers, server.Peer{ID: p.ID, RaftAddr: p.Raft, APIAddr: p.API})
	}
	if c.Join {
		sc.Peers = []server.Peer{{ID: c.ID, RaftAddr: c.Raft, APIAddr: c.API}}
	}
	return sc
}

// listenPatiently listens on an address that a predecessor may be just letting
// go of.
func listenPatiently(c link.Config) (net.Listener, error) {
	deadline := time.Now().Add(3 * time.Second)
	for {
		l, err := link.Listen(c)
		if err == nil || time.Now().After(deadline) {
			return l, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// daemonLog writes structured lines to standard error: key=value, or JSON.
func daemonLog(format string) *slog.Logger {
	opt := &slog.HandlerOptions{Level: slog.LevelInfo}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, opt))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, opt))
}

func metaCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "meta", Short: "Metadata nodes"}
	var config string
	run := &cobra.Command{
		Use:     "run --config FILE",
		Short:   "Run one metadata node until it is told to stop",
		Example: "  cairn meta run --config /etc/cairn/meta.toml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadMetaConfig(config)
			if err != nil {
				return err
			}
			// A thread that waits for the log's disk keeps its processor from Go's
			// runtime for up to 10 ms; reads must not wait for that.
			if os.Getenv("GOMAXPROCS") == "" {
				runtime.GOMAXPROCS(2 * runtime.GOMAXPROCS(0))
			}
			log := daemonLog(cfg.LogFormat)
			if err := coarseTimers(); err != nil {
				log.Info("each command costs more processor time than it could", "err", err)
			}
			m, err := startMeta(cfg, log)
			if err != nil {
				return err
			}
			fmt.Println("ready")
			return waitMeta(cmd.Context(), m)
		},
	}
	run.Flags().StringVar(&config, "config", "", "configuration file")
	must(run.MarkFlagRequired("config"))
	cmd.AddCommand(run, metaListCommand(c), metaAddCommand(c), metaRemoveCommand(c), metaBackupCommand(c), metaRestoreCommand())
	return cmd
}

// waitMeta waits for the end, asked for or not.
func waitMeta(ctx context.Context, m *metad) error {
	select {
	case <-ctx.Done():
		return m.close()
	case <-m.done:
		return errors.Join(status.Errorf(status.Internal, "the metadata node stopped by itself: its log says why"), m.close())
	}
}

func must(err error) {
	if err != nil {
		panic(err) // a flag that does not exist: a mistake in this program
	}
}
