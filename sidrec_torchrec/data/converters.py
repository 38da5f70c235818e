"""From public data sets, as their authors publish them, to our format (docs/data.md)."""

from sidrec_torchrec.data.amazon_reviews import AmazonReviewsConfig, convert_amazon_reviews
from sidrec_torchrec.data.movielens import MovieLensConfig, convert_movielens

__all__ = ["AmazonReviewsConfig", "MovieLensConfig", "convert_amazon_reviews", "convert_movielens"]
