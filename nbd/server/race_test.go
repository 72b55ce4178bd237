//go:build race

package server_test

// raceDetector makes sync.Pool forget at random, so that allocations mean
// nothing.
const raceDetector = true
