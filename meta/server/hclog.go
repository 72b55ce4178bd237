package server

import (
	"context"
	"io"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// sink passes raft's log lines on to slog. What raft calls an error is mostly a
// peer that does not answer: a warning here.
type sink struct{ log *slog.Logger }

var _ hclog.SinkAdapter = sink{}

// raftLogger returns the logger raft wants.
func raftLogger(log *slog.Logger) hclog.Logger {
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "raft", Level: hclog.Info, Output: io.Discard})
	l.RegisterSink(sink{log})
	return l
}

// Accept implements hclog.SinkAdapter.
func (s sink) Accept(_ string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	switch level {
	case hclog.Warn, hclog.Error:
		to = slog.LevelWarn
	case hclog.Info:
		to = slog.LevelInfo
	}
	s.log.Log(context.Background(), to, "raft: "+msg, args...)
}
